"""How the kernel reads what was written to an attribute. Pure; what it does not take is EINVAL."""

import errno
import string

from qat_simulation.kernel.model import failure


def line(text: str) -> str:
    """Without the one newline at its end that does not count (sysfs_streq)."""
    return text.removesuffix("\n")


def unsigned(text: str, limit: int) -> int:
    """kstrtou*(buf, 0): decimal, 0x or 0 for octal. Raises OSError EINVAL; a negative or larger number is one too."""
    digits = line(text).removeprefix("+").lower()
    base = 16 if digits.startswith("0x") else 8 if digits.startswith("0") and len(digits) > 1 else 10
    digits = digits.removeprefix("0x") if base == 16 else digits
    if not digits or not set(digits) <= set(string.hexdigits[:base]):
        raise failure(errno.EINVAL)
    number = int(digits, base)
    if number > limit:
        raise failure(errno.EINVAL)
    return number


def boolean(text: str) -> bool:
    """kstrtobool: y, t, 1, on; n, f, 0, off; only the first letters count. Raises OSError EINVAL."""
    start = text[:2].lower()
    if start[:1] in ("y", "t", "1") or start == "on":
        return True
    if start[:1] in ("n", "f", "0") or start == "of":
        return False
    raise failure(errno.EINVAL)
