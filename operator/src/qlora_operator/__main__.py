"""`python -m qlora_operator`: run until SIGTERM. Settings come from the environment, see settings.py."""

import asyncio
import os
import sys

import kopf

from qlora_operator import logs
from qlora_operator.handlers import Operator, register
from qlora_operator.settings import Settings


def main() -> None:
    """Read the settings and hand over to kopf."""
    try:
        settings = Settings.from_environment(os.environ)
    except ValueError as error:
        sys.exit(f"qlora-operator: {error}")
    logs.set_up(settings.log_level, settings.log_format)
    registry = register(Operator(settings))
    asyncio.run(
        kopf.operator(
            registry=registry,
            standalone=True,
            clusterwide=not settings.namespaces,
            namespaces=settings.namespaces,
        )
    )


if __name__ == "__main__":
    main()
