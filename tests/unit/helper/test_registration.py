"""RegisterResource: what the helper sends, and when it takes the answer for whole.

The bytes are read by libraries: HTTP/2 by h2, the message by protobuf; and a gRPC server answers them.
"""

import asyncio
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc.aio
import msgspec
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, StreamEnded

from qat_helper.dispatch import perform
from qat_helper.errors import PENDING_HEAD, OperationError
from qat_helper.operations import registration
from qat_helper.operations.node import Node
from qat_helper.operations.table import NAMES, OPERATIONS
from qat_helper.policy import Policy
from qat_server.kubelet.device_plugin import OPTIONS
from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2 as pb
from qat_server.kubelet.generated.deviceplugin_v1beta1_pb2_grpc import add_RegistrationServicer_to_server
from qat_server.kubelet.registration.answer import refusal
from qat_shared.codec import ProtocolError, decode_request, encode
from qat_shared.messages import AnyReply, ErrorCode, Failure, Registered, RegisterResource
from qat_shared.resources import RESOURCES
from qat_simulation.kubelet.grpc_services import RegisterRefusedError, Registration
from support.kubelet_sockets import short_directory

CY = RegisterResource(id=1, resource="qat.intel.com/cy", endpoint="cy.sock")
WANTED = pb.RegisterRequest(
    version="v1beta1", endpoint="qat.intel.com/cy.sock", resource_name="qat.intel.com/cy", options=OPTIONS
)


@pytest.fixture
def node() -> Iterator[Node]:
    with short_directory() as directory:
        (directory / "device-plugins").mkdir()
        policy = Policy(uids=frozenset(), operations=NAMES)
        yield Node(sysfs_root=directory, kubelet_dir=directory, server_gid=os.getegid(), policy=policy)


def socket_path(node: Node) -> Path:
    return node.kubelet_dir / "device-plugins/kubelet.sock"


@pytest.mark.parametrize("resource", sorted(RESOURCES))
def test_the_request_is_what_h2_and_protobuf_read_from_it(resource: str) -> None:
    endpoint = f"{resource.partition('/')[2]}.sock"
    connection = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
    connection.initiate_connection()
    events = connection.receive_data(registration.call(resource, endpoint))
    (request,) = (event for event in events if isinstance(event, RequestReceived))
    assert {str(name): str(value) for name, value in request.headers or ()} == {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/v1beta1.Registration/Register",
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    (body,) = (event.data for event in events if isinstance(event, DataReceived))
    assert struct.unpack(">BI", body[:5]) == (0, len(body) - 5)
    message = pb.RegisterRequest.FromString(body[5:])
    assert message == pb.RegisterRequest(
        version="v1beta1", endpoint=f"qat.intel.com/{endpoint}", resource_name=resource, options=OPTIONS
    )
    assert isinstance(events[-1], StreamEnded)


@pytest.mark.parametrize("why", ["", 'the ResourceName "x" is invalid', "100 % ünusual\n"])
async def test_a_grpc_server_takes_it_and_its_answer_is_decoded(node: Node, why: str) -> None:
    received = []

    async def register(request: pb.RegisterRequest) -> None:
        received.append(request)
        if why:
            raise RegisterRefusedError(why)

    server = grpc.aio.server()
    add_RegistrationServicer_to_server(Registration(register), server)
    server.add_insecure_port(f"unix:{socket_path(node)}")
    await server.start()
    try:
        reply = await asyncio.to_thread(lambda: perform(node, CY).reply)
    finally:
        await server.stop(None)
    assert received == [WANTED]
    assert isinstance(reply, Registered)
    assert reply.accepted is not bool(why)
    assert refusal(reply.answer) == (f"the kubelet answered UNKNOWN: {why}" if why else "the kubelet answered OK: ")


@contextmanager
def answering(node: Node, answer: Callable[[socket.socket], None]) -> Iterator[None]:
    """A kubelet that accepts one connection, and does this with it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(socket_path(node)))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            thread.join()


def read_all(connection: socket.socket) -> None:
    """Until the helper has closed its end."""
    while connection.recv(65536):
        pass


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


SETTINGS, PING = frame(4, 0, 0), frame(6, 0, 0, bytes(8))
HEADERS, TRAILERS, DATA, RESET = frame(1, 4, 1, b"\x88"), frame(1, 5, 1), frame(0, 0, 1, bytes(5)), frame(3, 0, 1, b"a")
WHOLE = {
    "an answer and trailers": (SETTINGS + HEADERS + DATA + TRAILERS, True),
    "trailers only": (SETTINGS + TRAILERS, False),
    "with frames of the connection between": (SETTINGS + HEADERS + PING + DATA + PING + TRAILERS, True),
    "a reset": (SETTINGS + RESET, False),
    "a reset after an answer": (SETTINGS + HEADERS + DATA + RESET, False),
    "the end of another stream first": (frame(1, 5, 3) + HEADERS + DATA + TRAILERS, True),
}
NOT_WHOLE = {
    "nothing": b"",
    "settings only": SETTINGS,
    "half a header": SETTINGS + TRAILERS[:5],
    "half a payload": SETTINGS + frame(1, 5, 1, bytes(100))[:-1],
    "the end of another stream": SETTINGS + frame(1, 5, 3),
    "no HTTP/2": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "more than the limit": PING * (registration.ANSWER_LIMIT // len(PING) + 1) + TRAILERS,
    "a frame longer than the limit": b"\xff\xff\xff" + bytes(2 * registration.ANSWER_LIMIT),
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("step", [None, 1], ids=["at once", "byte by byte"])
def test_a_whole_answer_is_returned_at_its_end(node: Node, name: str, step: int | None) -> None:
    answer, accepted = WHOLE[name]

    def send(connection: socket.socket) -> None:
        for at in range(0, len(answer), step or len(answer)):
            connection.sendall(answer[at : at + (step or len(answer))])
        read_all(connection)  # the helper does not wait for the connection's end

    with answering(node, send):
        reply = perform(node, CY).reply
    assert isinstance(reply, Registered)
    assert (reply.accepted, reply.answer) == (accepted, answer)


def failed(reply: AnyReply) -> tuple[ErrorCode, str]:
    assert isinstance(reply, Failure)
    return reply.code, reply.message


@pytest.mark.parametrize("name", NOT_WHOLE)
def test_without_a_whole_answer_it_fails(node: Node, name: str) -> None:
    def send(connection: socket.socket) -> None:
        try:
            connection.sendall(NOT_WHOLE[name])
            connection.shutdown(socket.SHUT_WR)
            read_all(connection)
        except OSError:
            pass  # the helper has had enough

    with answering(node, send):
        code, message = failed(perform(node, CY).reply)
    assert code is ErrorCode.UNAVAILABLE
    assert message == "the kubelet closed the connection, or another program answers on its socket"


@pytest.mark.parametrize("trickle", [False, True])
def test_a_kubelet_that_does_not_answer_is_left_at_the_deadline(
    node: Node, trickle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "ANSWER_TIMEOUT", 0.2)

    def send(connection: socket.socket) -> None:
        connection.settimeout(0.01)
        while True:
            try:
                if trickle:
                    connection.sendall(PING)
                if not connection.recv(65536):
                    return
            except TimeoutError:
                continue
            except OSError:
                return

    with answering(node, send):
        assert failed(perform(node, CY).reply) == (
            ErrorCode.TIMED_OUT,
            "the kubelet did not answer in time: it may still have registered the resource",
        )


def test_without_a_kubelet_it_is_unavailable(node: Node) -> None:
    code, message = failed(perform(node, CY).reply)
    assert code is ErrorCode.UNAVAILABLE
    assert "is it running?" in message


FOREIGN = (
    "nvidia.com/gpu",
    "qat.intel.com/gpu",
    "qat.intel.com/cy-dc",
    "qat.intel.com/sym-asym",
    "intel.com/qat.intel.com",
    "qat.intel.com.example.org/cy",
    "requests.qat.intel.com/cy",
    "a.qat.intel.com/cy",
)
MALFORMED: dict[str, dict[str, object]] = {
    "no domain": {"resource": "cy"},
    "a capital domain": {"resource": "Qat.intel.com/cy"},
    "empty": {"resource": ""},
    "two slashes": {"resource": "qat.intel.com/cy/cy"},
    "a line break": {"resource": "qat.intel.com/cy\n"},
    "a nul": {"resource": "qat.intel.com/cy\0"},
    "not ASCII": {"resource": "qat.intel.com/\u0441y"},
    "too long": {"resource": f"qat.intel.com/{'c' * 64}"},
    "not a text": {"resource": b"qat.intel.com/cy"},
    "another directory": {"endpoint": "../nvidia.sock"},
    "an absolute path": {"endpoint": "/run/nvidia.sock"},
    "a directory": {"endpoint": "a/cy.sock"},
    "dots": {"endpoint": "...sock"},
    "hidden": {"endpoint": ".cy.sock"},
    "no socket": {"endpoint": "kubelet_internal_checkpoint"},
    "a line break at the end": {"endpoint": "cy.sock\n"},
    "a nul in the endpoint": {"endpoint": "cy\0.sock"},
    "too long an endpoint": {"endpoint": f"{'c' * 33}.sock"},
    "no endpoint": {"endpoint": ""},
    "too long a wait": {"wait_ms": 10_001},
}


@pytest.mark.parametrize("resource", FOREIGN)
def test_names_of_others_are_denied(resource: str) -> None:
    policy = Policy(uids=frozenset(), operations=NAMES)
    request = {"op": "RegisterResource", "id": 1, "resource": resource, "endpoint": "cy.sock"}
    with pytest.raises(OperationError, match="is not a resource of QAT devices") as caught:
        OPERATIONS[RegisterResource].rule(policy, decode_request(packed(request)))
    assert caught.value.rule == "resource-name"


@pytest.mark.parametrize("name", MALFORMED)
def test_odd_names_do_not_decode(name: str) -> None:
    good = {"op": "RegisterResource", "id": 1, "resource": "qat.intel.com/cy", "endpoint": "cy.sock"}
    assert decode_request(packed(good)) == CY
    with pytest.raises(ProtocolError):
        decode_request(packed(good | MALFORMED[name]))


def packed(fields: dict[str, object]) -> bytes:
    return msgspec.msgpack.encode(fields)


def test_the_longest_answer_fits_into_a_reply() -> None:
    longest = bytes(registration.ANSWER_LIMIT)
    reply = Registered(id=1, audit=PENDING_HEAD, accepted=False, answer=longest)
    assert len(encode(reply)) < 2 * registration.ANSWER_LIMIT


ODD = {
    "nothing": b"",
    "garbage": b"\xff" * 100,
    "a reset": SETTINGS + frame(3, 0, 1, struct.pack(">I", 8)),
    "no status": SETTINGS + frame(1, 5, 1, b"\x88"),
    "HPACK that cannot be decoded": SETTINGS + frame(1, 5, 1, b"\xff\xff\xff\xff\xff"),
    "a status that no gRPC has": SETTINGS + frame(1, 5, 1, b"\x88\x00\x0bgrpc-status\x0299"),
}


@pytest.mark.parametrize("name", ODD)
def test_any_answer_gives_a_sentence(name: str) -> None:
    said = refusal(ODD[name])
    assert said.startswith("the kubelet")
    assert "\n" not in said
