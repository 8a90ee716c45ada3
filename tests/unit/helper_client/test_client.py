"""The helper client: answers reach their callers, no descriptor leaks, and a lost connection is restored."""

import asyncio
import os
import select
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qat_server.helper_client.client import HelperClient, HelperError, HelperUnavailableError
from qat_server.instrumentation.counters import Counters
from qat_shared.codec import decode_request, encode
from qat_shared.messages import (
    MAX_MESSAGE,
    PROTOCOL,
    AnyReply,
    AnyRequest,
    AuditHead,
    Bound,
    Connected,
    DpdkDriver,
    ErrorCode,
    Failure,
    Heartbeat,
    Hello,
    Welcome,
)
from qat_shared.pci import PciAddress
from support.conditions import until

VF = PciAddress(0, 0x6B, 0, 1)
HEAD = AuditHead(sequence=7, hash="ab" * 32)
Answer = Callable[[AnyRequest], "tuple[AnyReply, list[int]] | None"]


def welcome(request: AnyRequest, protocol: int = PROTOCOL) -> AnyReply:
    return Welcome(id=request.id, audit=HEAD, protocol=protocol, version="0", operations=("BindDriver",))


class ScriptedHelper:
    """Answers Hello, and everything else by `answer`; None means no answer (yet)."""

    def __init__(self, path: Path, answer: Answer) -> None:
        self.path, self.answer = path, answer
        self.requests: list[AnyRequest] = []
        self.peer: socket.socket | None = None
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listening.bind(str(path))
        self._listening.listen()
        self._listening.setblocking(False)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self.peer, _ = await loop.sock_accept(self._listening)
            self.peer.setblocking(False)
            while packet := await loop.sock_recv(self.peer, MAX_MESSAGE):
                request = decode_request(packet)
                self.requests.append(request)
                reply = (welcome(request), []) if isinstance(request, Hello) else self.answer(request)
                if reply is not None:
                    socket.send_fds(self.peer, [encode(reply[0])], reply[1])
            self.peer.close()

    def close(self) -> None:
        self._listening.close()
        if self.peer is not None:
            self.peer.close()


@asynccontextmanager
async def connected(answer: Answer) -> AsyncIterator[tuple[HelperClient, ScriptedHelper]]:
    with tempfile.TemporaryDirectory(prefix="qat-", dir="/tmp") as directory:
        helper = ScriptedHelper(Path(directory) / "h.sock", answer)
        changed, counters = asyncio.Event(), Counters()
        client = HelperClient(helper.path, counters)
        client.on_change.append(changed.set)
        tasks = [asyncio.create_task(helper.run()), asyncio.create_task(client.run())]
        try:
            async with asyncio.timeout(120):
                while not client.connected:
                    await changed.wait()
                    changed.clear()
            yield client, helper
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            helper.close()


async def test_answers_in_another_order_reach_their_callers() -> None:
    held: list[AnyRequest] = []

    def answer(request: AnyRequest) -> None:
        held.append(request)

    async with connected(answer) as (client, helper):
        first = asyncio.create_task(client.bind(VF, DpdkDriver.VFIO_PCI, "test"))
        second = asyncio.create_task(client.heartbeat(VF))
        async with asyncio.timeout(120):
            await until(lambda: len(held) == 2)
            assert helper.peer is not None
            by_kind = {type(request).__name__: request.id for request in held}
            helper.peer.send(encode(Heartbeat(id=by_kind["ReadHeartbeat"], audit=HEAD, alive=False)))
            helper.peer.send(encode(Bound(id=by_kind["BindDriver"], audit=HEAD, driver="vfio-pci", changed=True)))
            assert (await second).alive is False
            assert (await first).driver == "vfio-pci"
    assert client.audit.head == HEAD
    assert client._counters.helper_requests == {("Hello", "ok"): 1, ("BindDriver", "ok"): 1, ("ReadHeartbeat", "ok"): 1}


async def test_the_audit_head_of_each_answer_is_checked(caplog: pytest.LogCaptureFixture) -> None:
    heads = [AuditHead(sequence=9, hash="cd" * 32), AuditHead(sequence=8, hash="ef" * 32)]

    def answer(request: AnyRequest) -> tuple[AnyReply, list[int]]:
        return Heartbeat(id=request.id, audit=heads.pop(0), alive=True), []

    async with connected(answer) as (client, helper):
        await client.heartbeat(VF)
        assert client._counters.audit_breaks == 0
        await client.heartbeat(VF)
        assert client._counters.audit_breaks == 1
        assert helper.peer is not None
        helper.peer.shutdown(socket.SHUT_RDWR)
        async with asyncio.timeout(120):  # a helper that comes back brings one with its welcome
            await until(lambda: client._counters.audit_breaks == 2)
    assert client.audit.head == HEAD
    assert "went back to line 7 (abababababab) after line 8 (efefefefefef)" in client.audit.last_break
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert [record.message for record in errors] == ["audit log does not continue"] * 2


async def test_a_failure_is_raised_with_its_fields() -> None:
    def answer(request: AnyRequest) -> tuple[AnyReply, list[int]]:
        return Failure(id=request.id, audit=HEAD, code=ErrorCode.KERNEL, message="no", errno=16, rule="r"), []

    async with connected(answer) as (client, _):
        with pytest.raises(HelperError, match="no") as caught:
            await client.bind(VF, DpdkDriver.VFIO_PCI, "test")
    assert (caught.value.code, caught.value.errno, caught.value.rule) == (ErrorCode.KERNEL, 16, "r")


async def test_a_passed_socket_arrives() -> None:
    ours, kubelet = socket.socketpair()

    def answer(request: AnyRequest) -> tuple[AnyReply, list[int]]:
        return Connected(id=request.id, audit=HEAD), [ours.fileno()]

    async with connected(answer) as (client, _):
        with await client.open_pod_resources() as passed:
            passed.sendall(b"hello")
            assert kubelet.recv(10) == b"hello"
    ours.close()
    kubelet.close()


async def test_unexpected_descriptors_are_closed() -> None:
    def answer(request: AnyRequest) -> tuple[AnyReply, list[int]]:
        return Heartbeat(id=request.id, audit=HEAD, alive=True), [0, 0]

    async with connected(answer) as (client, _):
        await client.heartbeat(VF)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            await client.heartbeat(VF)
        assert len(os.listdir("/proc/self/fd")) == before


async def test_calls_fail_when_the_connection_ends_and_the_client_reconnects() -> None:
    async with connected(lambda _: None) as (client, helper):
        call = asyncio.create_task(client.heartbeat(VF))
        async with asyncio.timeout(120):
            await until(lambda: len(helper.requests) == 2)
            assert helper.peer is not None
            helper.peer.shutdown(socket.SHUT_RDWR)
            with pytest.raises(HelperUnavailableError):
                await call
            await until(lambda: client.connected)


async def test_a_helper_that_ends_before_its_welcome_fails_the_attempt() -> None:
    with tempfile.TemporaryDirectory(prefix="qat-", dir="/tmp") as directory:
        path = Path(directory) / "h.sock"
        client = HelperClient(path, Counters())
        task = asyncio.create_task(client.run())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
                listening.bind(str(path))
                listening.listen()
                await until(lambda: select.select([listening], [], [], 0)[0])
            # The listener has gone with the connection that it never accepted, as when the helper is ended.
            await until(lambda: "the connection to the helper ended" in client.error)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_without_a_helper_calls_fail_at_once_with_the_reason() -> None:
    client = HelperClient(Path("/tmp/qat-no-such-directory/h.sock"), Counters())
    task = asyncio.create_task(client.run())
    try:
        await until(lambda: "No such file" in client.error)
        with pytest.raises(
            HelperUnavailableError, match=r"cannot reach the helper at .*No such file.*: is qat-helper running\?"
        ):
            await client.heartbeat(VF)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_another_protocol_version_has_its_own_error() -> None:
    with tempfile.TemporaryDirectory(prefix="qat-", dir="/tmp") as directory:
        path = Path(directory) / "h.sock"
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listening.bind(str(path))
        listening.listen()
        listening.setblocking(False)
        client = HelperClient(path, Counters())
        task = asyncio.create_task(client.run())
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(120):
                peer, _ = await loop.sock_accept(listening)
                peer.setblocking(False)
                request = decode_request(await loop.sock_recv(peer, MAX_MESSAGE))
                peer.send(encode(welcome(request, protocol=PROTOCOL + 1)))
                await until(lambda: "install the same version of both" in client.error)
                peer.close()
            assert not client.connected
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            listening.close()
