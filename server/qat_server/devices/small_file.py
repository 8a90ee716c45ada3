"""Small text files of the kernel's, each of which may not be there, or not be for us to read."""

from pathlib import Path
from typing import Final

_LIMIT: Final = 64 * 1024


def read_text(path: Path) -> str:
    """What stands in it, without blanks around it; "" when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(_LIMIT).decode(errors="replace").strip()
    except OSError:
        return ""
