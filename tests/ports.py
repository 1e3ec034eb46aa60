"""Ports of this machine for servers of tests."""

import socket


def free_port() -> int:
    """One that nobody listens on at the moment, on 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
