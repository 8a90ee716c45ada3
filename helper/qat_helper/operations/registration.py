"""RegisterResource: the only gRPC call that the helper makes, Register on <kubelet dir>/device-plugins/kubelet.sock.

The request is constant but for two short strings, so it needs no gRPC library. Of the answer, only the frames' headers
are read, to find its end; the server decodes it. Sources: RFC 9113 (frames), RFC 7541 (header fields), gRPC's
doc/PROTOCOL-HTTP2.md, protos/deviceplugin_v1beta1.proto.
"""

import socket
import time
from collections.abc import Iterator
from typing import Final

from qat_helper.errors import PENDING_HEAD, OperationError
from qat_helper.operations.kubelet import DEVICE_PLUGINS, connect
from qat_helper.operations.node import Node, Outcome
from qat_shared import NAMESPACE
from qat_shared.messages import ErrorCode, Registered, RegisterResource

ANSWER_TIMEOUT: Final = 12.0
"""Seconds. The kubelet itself gives up after ten when it cannot connect to the endpoint."""
ANSWER_LIMIT: Final = 16 * 1024
_DATA, _HEADERS, _RST_STREAM, _SETTINGS = 0, 1, 3, 4
_END_STREAM, _END_HEADERS = 1, 4
_STREAM: Final = 1
_HEADER_FIELDS: Final = (
    b"\x83\x86"  # :method POST, :scheme http
    b"\x04\x1e/v1beta1.Registration/Register"  # :path
    b"\x01\x09localhost"  # :authority
    b"\x0f\x10\x10application/grpc"  # content-type
    b"\x00\x02te\x08trailers"
)
_OPTIONS: Final = b"\x22\x02\x10\x01"  # get_preferred_allocation_available


def register_resource(node: Node, request: RegisterResource) -> Outcome:
    """Register, and return the kubelet's answer as it is. Raises OperationError."""
    with socket.socket(fileno=connect(node.kubelet_dir / DEVICE_PLUGINS, request.wait_ms)) as kubelet:
        answer = _exchange(kubelet, call(request.resource, request.endpoint))
    kinds = {kind for kind, _ in _frames(answer)}
    accepted = _DATA in kinds and _RST_STREAM not in kinds
    return Outcome(Registered(id=request.id, audit=PENDING_HEAD, accepted=accepted, answer=answer))


def call(resource: str, endpoint: str) -> bytes:
    """All bytes that the kubelet is sent."""
    fields = ((b"\x0a", "v1beta1"), (b"\x12", f"{NAMESPACE}/{endpoint}"), (b"\x1a", resource))
    # A length is one byte: no text is longer than 127 bytes.
    message = b"".join(key + bytes((len(text),)) + text.encode() for key, text in fields) + _OPTIONS
    body = b"\0" + len(message).to_bytes(4, "big") + message
    frames = (_frame(_SETTINGS, 0, 0, b""), _frame(_HEADERS, _END_HEADERS, _STREAM, _HEADER_FIELDS))
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"".join(frames) + _frame(_DATA, _END_STREAM, _STREAM, body)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _exchange(kubelet: socket.socket, request: bytes) -> bytes:
    """The whole answer. Raises OperationError."""
    deadline = time.monotonic() + ANSWER_TIMEOUT
    answer = b""
    try:
        kubelet.settimeout(ANSWER_TIMEOUT)
        kubelet.sendall(request)
        while len(answer) < ANSWER_LIMIT:
            if any(kind == _RST_STREAM or flags & _END_STREAM for kind, flags in _frames(answer)):
                return answer
            kubelet.settimeout(max(0.001, deadline - time.monotonic()))
            if not (received := kubelet.recv(ANSWER_LIMIT - len(answer))):
                break
            answer += received
    except TimeoutError as error:
        raise OperationError(
            ErrorCode.TIMED_OUT, "the kubelet did not answer in time: it may still have registered the resource"
        ) from error
    except OSError:  # reset: the same as an end
        pass
    raise OperationError(
        ErrorCode.UNAVAILABLE, "the kubelet closed the connection, or another program answers on its socket"
    )


def _frames(answer: bytes) -> Iterator[tuple[int, int]]:
    """Type and flags of each whole HEADERS, DATA and RST_STREAM frame of the call's stream."""
    at = 0
    while (end := at + 9 + int.from_bytes(answer[at : at + 3], "big")) <= len(answer):
        kind, flags, stream = answer[at + 3], answer[at + 4], int.from_bytes(answer[at + 5 : at + 9], "big")
        if stream == _STREAM and kind in (_HEADERS, _DATA, _RST_STREAM):
            yield kind, flags
        at = end
