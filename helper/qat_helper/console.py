"""Single lines on standard error, for the process that started the helper."""

import os
from contextlib import suppress


def log(text: str) -> None:
    """Write one line. An error is ignored: the helper keeps serving when nobody reads its standard error."""
    with suppress(OSError):
        os.write(2, f"qat-helper: {visible(text)}\n".encode(errors="backslashreplace"))


def visible(text: str) -> str:
    """The text with control characters escaped: it may quote a file, which must not write lines of its own."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
