"""Single lines on standard error, for the process that started the helper."""

import os
from contextlib import suppress


def log(text: str) -> None:
    """Write one line. An error is ignored: the helper keeps serving when nobody reads its standard error."""
    with suppress(OSError):
        os.write(2, f"qat-helper: {text}\n".encode(errors="backslashreplace"))
