"""The kubelet's answer to Register, as the helper received it: HTTP/2 frames, decoded by h2. Pure."""

import urllib.parse
from typing import Final

import grpc

_LONGEST_REASON: Final = 500
_STATUS: Final = {str(code.value[0]): code.name for code in grpc.StatusCode}


def refusal(answer: bytes) -> str:
    """Why the kubelet refuses, as a sentence. The kubelet's own words are cut to 500 characters.

    `answer`: all bytes that the kubelet sent, from the beginning of the connection to the end of the call.
    """
    # Only a refusal needs a decoder, so most servers never load one.
    from h2.config import H2Configuration  # noqa: PLC0415
    from h2.connection import H2Connection  # noqa: PLC0415
    from h2.events import ResponseReceived, StreamReset, TrailersReceived  # noqa: PLC0415
    from h2.exceptions import H2Error  # noqa: PLC0415

    connection = H2Connection(H2Configuration(client_side=True, header_encoding=None))
    connection.initiate_connection()
    connection.send_headers(1, ((":method", "POST"), (":scheme", "http"), (":path", "/"), (":authority", "localhost")))
    headers: dict[bytes, bytes] = {}
    try:
        for event in connection.receive_data(answer):
            if isinstance(event, StreamReset):
                return f"the kubelet reset the call (HTTP/2 error {int(event.error_code or 0)})"
            if isinstance(event, ResponseReceived | TrailersReceived):
                headers.update(event.headers or ())
    except H2Error as error:
        return f"the kubelet's answer cannot be read: {error}"
    # PROTOCOL-HTTP2.md: the message is percent-encoded UTF-8, and absent when it is empty.
    code = headers.get(b"grpc-status", b"").decode("ascii", "replace")
    message = urllib.parse.unquote(headers.get(b"grpc-message", b"").decode("ascii", "replace"))
    return f"the kubelet answered {_STATUS.get(code, 'without a status')}: {message[:_LONGEST_REASON]}"
