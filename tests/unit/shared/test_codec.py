"""The message decoder: any bytes give a message or ProtocolError, never anything else."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat_shared.codec import ProtocolError, decode_reply, decode_request, encode
from qat_shared.messages import (
    MAX_MESSAGE,
    PROTOCOL,
    AnyReply,
    AnyRequest,
    AuditHead,
    BindDriver,
    Bound,
    DeviceConfig,
    DpdkDriver,
    ErrorCode,
    Failure,
    Hello,
    OpenPodResources,
    PrepareSocketDirectory,
    ReadDeviceConfig,
    ReadHeartbeat,
    Registered,
    RegisterResource,
    ReleaseDriver,
    SocketDirectory,
)
from qat_shared.pci import PciAddress

VF = PciAddress(0, 0x6B, 0, 1)
HEAD = AuditHead(sequence=1, hash="0" * 64)
REQUESTS: list[AnyRequest] = [
    Hello(id=0, protocol=PROTOCOL, version="1"),
    BindDriver(id=1, address=VF, driver=DpdkDriver.VFIO_PCI, reason="why"),
    ReleaseDriver(id=2**32 - 1, address=VF),
    ReadHeartbeat(id=3, address=VF),
    ReadDeviceConfig(id=4, address=VF),
    PrepareSocketDirectory(id=5, directory=SocketDirectory.PLUGINS_REGISTRY),
    OpenPodResources(id=6, wait_ms=10_000),
    RegisterResource(id=7, resource="qat.intel.com/cy", endpoint="cy.sock", wait_ms=10_000),
]
REPLIES: list[AnyReply] = [
    Bound(id=1, audit=HEAD, driver=None, changed=False),
    Failure(id=2, audit=HEAD, code=ErrorCode.BUSY, message="wait"),
    Registered(id=3, audit=HEAD, accepted=True, answer=bytes(range(256))),
]
GOOD = {"op": "BindDriver", "id": 1, "address": [0, 0x6B, 0, 1], "driver": "vfio-pci"}


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda message: type(message).__name__)
def test_requests_arrive_as_they_were_sent(request_: AnyRequest) -> None:
    assert decode_request(encode(request_)) == request_


@pytest.mark.parametrize("reply", REPLIES, ids=lambda message: type(message).__name__)
def test_replies_arrive_as_they_were_sent(reply: AnyReply) -> None:
    assert decode_reply(encode(reply)) == reply


WRONG: dict[str, dict[str, object]] = {
    "unknown kind": {"op": "RunCommand"},
    "unknown field": {"path": "/etc/passwd"},
    "address as text": {"address": "0000:6b:00.1"},
    "address too short": {"address": [0, 0x6B, 0]},
    "address too long": {"address": [0, 0x6B, 0, 1, 0]},
    "bus too large": {"address": [0, 0x100, 0, 0]},
    "device too large": {"address": [0, 0, 0x20, 0]},
    "function too large": {"address": [0, 0, 0, 8]},
    "negative domain": {"address": [-1, 0, 0, 0]},
    "unknown driver": {"driver": "e1000"},
    "driver with a path": {"driver": "../../x"},
    "reason too long": {"reason": "x" * 201},
    "negative id": {"id": -1},
    "id too large": {"id": 2**32},
    "id as text": {"id": "1"},
    "id missing": {"id": None},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_wrong_field_is_refused(change: dict[str, object]) -> None:
    assert isinstance(decode_request(msgspec.msgpack.encode(GOOD)), BindDriver)
    with pytest.raises(ProtocolError):
        decode_request(msgspec.msgpack.encode(GOOD | change))


PACKETS = {
    "empty": b"",
    "cut short": msgspec.msgpack.encode(GOOD)[:-1],
    "something behind it": msgspec.msgpack.encode(GOOD) + b"\0",
    "too long": b"\xc0" * (MAX_MESSAGE + 1),
    "no map": msgspec.msgpack.encode([1, 2, 3]),
    "deeply nested": b"\x91" * 60_000,
    "broken UTF-8 in a key": b"\x81\xa2\xff\xfe\x01",
    "broken UTF-8 in the kind": b"\x81\xa2op\xa2\xff\xfe",
    "a huge array announced": b"\x81\xa7address\xdd\xff\xff\xff\xff",
    "a huge map announced": b"\xdf\xff\xff\xff\xff",
    "a huge text announced": b"\x81\xa2op\xdb\xff\xff\xff\xff",
    "an extension type": b"\xc7\x01\x05\x00",
}


@pytest.mark.parametrize("packet", PACKETS.values(), ids=PACKETS)
def test_packets_that_are_not_messages_are_refused(packet: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_request(packet)
    with pytest.raises(ProtocolError):
        decode_reply(packet)


def test_a_message_too_long_for_a_packet_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="65536 are allowed"):
        encode(DeviceConfig(id=1, audit=HEAD, text="x" * MAX_MESSAGE))


def mutations(message: bytes) -> st.SearchStrategy[bytes]:
    """A message with one piece replaced by other bytes."""
    positions = st.tuples(st.integers(0, len(message)), st.integers(0, 4), st.binary(max_size=6))
    return positions.map(lambda how: message[: how[0]] + how[2] + message[how[0] + how[1] :])


packets = st.binary(max_size=300) | st.sampled_from([*map(encode, REQUESTS), *map(encode, REPLIES)]).flatmap(mutations)
structures = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)
fields = st.fixed_dictionaries(
    {"op": st.sampled_from([type(request).__name__ for request in REQUESTS])},
    optional=dict.fromkeys(("id", "reason", "address", "driver", "service", "wait_ms", "protocol"), structures),
)


@given(packets | (structures | fields).map(msgspec.msgpack.encode))
def test_any_bytes_give_a_message_or_a_protocol_error(packet: bytes) -> None:
    for decode in (decode_request, decode_reply):
        try:
            message = decode(packet)
        except ProtocolError:
            continue
        assert decode(encode(message)) == message


@pytest.mark.parametrize("directory", ["plugins_registry", "../etc", "", 1, None], ids=str)
def test_a_directory_is_one_of_two_words(directory: object) -> None:
    packet = msgspec.msgpack.encode({"op": "PrepareSocketDirectory", "id": 1, "directory": directory})
    with pytest.raises(ProtocolError):
        decode_request(packet)


def test_the_default_directory_is_that_of_device_plugins() -> None:
    request = decode_request(msgspec.msgpack.encode({"op": "PrepareSocketDirectory", "id": 1}))
    assert request == PrepareSocketDirectory(id=1, directory=SocketDirectory.DEVICE_PLUGINS)


REASON = "serve it to pods; it's 1|2 ~"
BAD_REASONS = {
    "a quote": 'so "x',
    "a backslash": "so \\x",
    "a line break": "so\n",
    "a line break at the end": f"{REASON}\n",
    "an escape sequence": "\x1b[2K",
    "delete": "\x7f",
    "not ASCII": "\u202egnihtyna",
    "an astral character": "\U0001d11e",
    "too long": "x" * 65,
}


@pytest.mark.parametrize("reason", BAD_REASONS.values(), ids=BAD_REASONS)
def test_a_reason_that_escaping_would_lengthen_or_that_is_long_is_refused(reason: str) -> None:
    packet = {"op": "PrepareSocketDirectory", "id": 1}
    for good in ("", REASON, "x" * 64):
        assert decode_request(msgspec.msgpack.encode(packet | {"reason": good})).reason == good
    with pytest.raises(ProtocolError, match="reason"):
        decode_request(msgspec.msgpack.encode(packet | {"reason": reason}))
