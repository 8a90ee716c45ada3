"""A stand-in for the helper's client: the helper's own operations on the kubelet's sockets, without its process."""

import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from qat_helper.dispatch import perform
from qat_helper.operations.node import Node, Outcome
from qat_helper.operations.table import NAMES
from qat_helper.policy import Policy
from qat_server.helper_client.client import HelperError, HelperUnavailableError
from qat_shared.messages import ErrorCode, Failure, OpenPodResources, Registered, RegisterResource


class DirectHelper:
    """Its calls wait for the kubelet up to `wait_ms`, as the helper does. If `error` is set, it is raised.

    `waiting`: the number of calls that are waiting. `requests`: the operations of all calls.
    """

    def __init__(self, kubelet_directory: Path) -> None:
        policy = Policy(uids=frozenset(), operations=NAMES)
        self._node = Node(sysfs_root=Path("/"), kubelet_dir=kubelet_directory, server_gid=os.getegid(), policy=policy)
        self.requests: list[type] = []
        self.waiting = 0
        self.error: HelperError | None = None

    async def register_resource(self, resource: str, endpoint: str, wait_ms: int = 0) -> Registered:
        request = RegisterResource(id=1, resource=resource, endpoint=endpoint)
        # In a thread: the kubelet, which is in this process, answers meanwhile.
        outcome = await self._until_it_listens(wait_ms, lambda: perform(self._node, request), RegisterResource)
        assert isinstance(outcome.reply, Registered)
        return outcome.reply

    async def open_pod_resources(self, wait_ms: int = 0) -> socket.socket:
        request = OpenPodResources(id=1)
        outcome = await self._until_it_listens(wait_ms, lambda: perform(self._node, request), OpenPodResources)
        return socket.socket(fileno=outcome.descriptor)

    async def _until_it_listens(self, wait_ms: int, call: Callable[[], Outcome], kind: type) -> Outcome:
        self.requests.append(kind)
        if self.error is not None:
            raise self.error
        deadline = asyncio.get_running_loop().time() + wait_ms / 1000
        while True:
            outcome = await asyncio.to_thread(call)
            if not isinstance(outcome.reply, Failure):
                return outcome
            reply = outcome.reply
            not_there = reply.code is ErrorCode.UNAVAILABLE and reply.errno
            if not not_there or asyncio.get_running_loop().time() >= deadline:
                raise HelperError(reply.code, reply.message, reply.errno, reply.rule)
            self.waiting += 1
            try:
                await asyncio.sleep(0.002)
            finally:
                self.waiting -= 1


def no_helper() -> HelperError:
    return HelperUnavailableError("there is no helper")


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """A directory whose path leaves room for a socket: a Unix socket's path has 107 bytes at most."""
    directory = Path(tempfile.mkdtemp(prefix="qat-", dir="/tmp"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)
