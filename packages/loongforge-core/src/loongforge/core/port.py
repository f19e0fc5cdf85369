"""A port of this machine on which the workers of one job meet."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A free port of the loopback interface that nobody else is given while this is open; rank 0 can listen on it.

    A port that is only looked up is free for as long as nobody asks: a connection that any process opens before rank 0
    listens may be given it. The kernel gives a bound one to nobody, and lets rank 0's store, which asks for
    `SO_REUSEADDR` as we do, listen beside a socket that does not.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
