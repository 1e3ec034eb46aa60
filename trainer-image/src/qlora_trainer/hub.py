"""The hub's repositories: which commit a run reads, and how it comes to this node.

Rule: the first pod leaves the commit in the run's output store, every other pod reads it there. A branch may move
before the next pod starts, and a run whose members or restarts read different weights is over.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from qlora_api.layout import source_key
from qlora_api.run import TrainConfig
from qlora_trainer.control import WorkerEnv
from qlora_trainer.errors import BadData, BadModel, StorageError
from qlora_trainer.output import open_output
from qlora_trainer.storage import ObjectStore, read_bytes

_COMMIT = re.compile("[0-9a-f]{40}")
T = TypeVar("T")


def locate_for_run(
    config: TrainConfig,
    env: WorkerEnv,
    name: str,
    uri: str,
    revision: str | None,
    locate: Callable[[str | None], tuple[Path, T]],
) -> tuple[Path, T]:
    """What `locate` finds at the revision; of a hub's branch or tag, at the commit that the run's first pod found.

    name: of the source within the run. Raises StorageError, and what `locate` raises.
    """
    if not uri.startswith("hf://") or (revision and _COMMIT.fullmatch(revision)):
        return locate(revision)
    store, key = open_output(config, env)[0], source_key(name)
    if (commit := _commit(store, key)) is not None:
        return locate(commit)
    folder, names = locate(revision)
    pin = {"uri": uri, "revision": revision, "commit": folder.name}  # the hub's cache names its folders by commit
    store.put(key, json.dumps(pin).encode(), if_none_match=True)
    commit = _commit(store, key)
    return (folder, names) if commit == folder.name else locate(commit)


def _commit(store: ObjectStore, key: str) -> str | None:
    try:
        return str(json.loads(read_bytes(store, key))["commit"])
    except FileNotFoundError:
        return None


def fetch(
    uri: str, revision: str | None, secret: str, patterns: tuple[str, ...], env: WorkerEnv, top_only: bool
) -> Path:
    """The folder of the matching files at the revision in the node's cache. Raises BadModel, BadData, StorageError."""
    from huggingface_hub import errors, snapshot_download

    bad = BadModel if secret == "model" else BadData
    token = env.secrets_dir / secret / "HF_TOKEN"
    try:
        path = snapshot_download(
            repo_id=uri.removeprefix("hf://"),
            repo_type=secret,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"] if top_only else None,
            cache_dir=env.cache_dir / "hub",
            token=token.read_text().strip() if token.is_file() else None,
        )
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        hint = "correct uri or revision, or give HF_TOKEN in the Secret of secretRef when it is private or gated"
        raise bad(f"{uri}: {str(error).splitlines()[0]}; {hint}") from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        raise StorageError(
            f"cannot fetch {uri} from the hub: {str(error).splitlines()[0]}; check the network"
        ) from error
    return Path(path)
