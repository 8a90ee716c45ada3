"""Connections to the kubelet that were passed to peers: a copy of each, through which it is ended.

A peer can keep its own copy of a descriptor for as long as it likes. Shutting a socket down ends the connection for
every copy. So at most MAX_OPEN connections of all peers together are open, and none of a peer that has disconnected.
Neither shutdown nor close blocks on a Unix stream socket that only the kubelet sends to.
"""

import os
import socket
from collections import deque
from contextlib import suppress
from typing import Final

MAX_OPEN: Final = 4
"""A server has one at a time; during an update there are two servers."""


class PassedConnections:
    """The connections that may still be open, oldest first."""

    def __init__(self) -> None:
        self._open: deque[tuple[object, socket.socket]] = deque()

    def add(self, peer: object, descriptor: int) -> None:
        """Keep a copy of a connection that is about to be passed; end the oldest when there are too many."""
        while len(self._open) >= MAX_OPEN:
            _end(self._open.popleft()[1])
        self._open.append((peer, socket.socket(fileno=os.dup(descriptor))))

    def end_all(self, peer: object) -> None:
        """End all connections that were passed to this peer, which has left."""
        for entry in [entry for entry in self._open if entry[0] is peer]:
            self._open.remove(entry)
            _end(entry[1])


def _end(kubelet: socket.socket) -> None:
    with kubelet, suppress(OSError):  # the kubelet has ended it already
        kubelet.shutdown(socket.SHUT_RDWR)
