"""Encode messages into packets and decode them. The only exception that callers see is ProtocolError."""

from typing import Final, TypeVar

import msgspec

from qat_shared.messages import MAX_MESSAGE, AnyReply, AnyRequest

_T = TypeVar("_T")

_encoder: Final = msgspec.msgpack.Encoder()
_requests: Final[msgspec.msgpack.Decoder[AnyRequest]] = msgspec.msgpack.Decoder(AnyRequest)
_replies: Final[msgspec.msgpack.Decoder[AnyReply]] = msgspec.msgpack.Decoder(AnyReply)


class ProtocolError(Exception):
    """A packet is not a message of this protocol, or a message does not fit into a packet."""


def encode(message: AnyRequest | AnyReply) -> bytes:
    """Encode one packet. Raises ProtocolError if it would exceed MAX_MESSAGE."""
    packet = _encoder.encode(message)
    if len(packet) > MAX_MESSAGE:
        raise ProtocolError(f"the message has {len(packet)} bytes; at most {MAX_MESSAGE} are allowed")
    return packet


def decode_request(packet: bytes) -> AnyRequest:
    """Decode a request. Raises ProtocolError, which says what is wrong and where."""
    return _decode(_requests, packet)


def decode_reply(packet: bytes) -> AnyReply:
    """Decode a reply. Raises ProtocolError, which says what is wrong and where."""
    return _decode(_replies, packet)


def _decode(decoder: "msgspec.msgpack.Decoder[_T]", packet: bytes) -> _T:
    if len(packet) > MAX_MESSAGE:
        raise ProtocolError(f"the packet is longer than {MAX_MESSAGE} bytes")
    try:
        return decoder.decode(packet)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a message of this protocol: {error}") from None
