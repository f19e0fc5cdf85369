"""The port on which a job's workers meet is nobody else's from when it is chosen."""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import TCPStore

from loongforge.core.port import held_port


def test_nobody_is_given_the_port_and_a_store_listens_on_it_again_and_again() -> None:
    with held_port() as port:
        for _ in range(2):
            store = TCPStore("127.0.0.1", port, 1, True, timedelta(seconds=10))
            store.set("here", "yes")
            assert store.get("here") == b"yes"
            del store
        with socket.create_server(("127.0.0.1", 0)) as server:
            assert server.getsockname()[1] != port


def test_the_port_is_free_again_afterwards() -> None:
    with held_port() as port:
        pass
    with socket.create_server(("127.0.0.1", port)):
        pass
