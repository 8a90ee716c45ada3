"""AppArmor's state as an unprivileged process sees it, and advice when it may have refused a write by the helper.

Only the kernel's log, which only root can read, names the process and the file of a refusal. But each process can read
its own profile, and the helper's container usually has the same profile as the server's.
"""

import errno
import re
from pathlib import Path
from typing import Final

from msgspec import Struct

# The default profiles of containerd, Docker, CRI-O and Podman.
_DEFAULT: Final = re.compile(r"cri-containerd\.apparmor\.d|docker-default|crio-default.*|containers-default.*")
_LIMIT: Final = 64 * 1024  # bytes
_OURS: Final = re.compile(r"qat-.*")
_SETTING: Final = (
    "give the helper's container securityContext.appArmorProfile {type: Unconfined}, as deployments/base does, "
    "or {type: Localhost, localhostProfile: qat-helper}, with apparmor/qat-helper loaded on the node"
)


class AppArmor(Struct, frozen=True):
    """Whether AppArmor is on (None: unknown), and the profile of this process ("" for none)."""

    enabled: bool | None = None
    profile: str = ""

    def advice(self, refusal: int) -> str:
        """Advice on a write to sysfs that failed with errno `refusal`; "" if AppArmor is not the likely cause."""
        # AppArmor refuses file access with EACCES. Root without capabilities gets that only from security modules.
        if self.enabled is False or (refusal != errno.EACCES and not (self.enabled and refusal == errno.EPERM)):
            return ""
        if not self.enabled:
            return f"if AppArmor is on, the default profile of containers refuses every write to /sys: {_SETTING}"
        return f"AppArmor is on: {self.remedy}"

    @property
    def remedy(self) -> str:
        """Why AppArmor refused a write by the helper, and what to do about it."""
        if _OURS.fullmatch(self.profile):
            return (
                "if the helper is under its profile too, find the denied access with: dmesg | grep DENIED; "
                "and allow it in /etc/apparmor.d/local/qat-helper"
            )
        own = f" (this one is under {self.profile})" if _DEFAULT.fullmatch(self.profile) else ""
        return f"the default profile of containers{own} refuses every write to /sys: {_SETTING}"


def read_text(path: Path) -> str:
    """The stripped text of a small kernel file; "" when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(_LIMIT).decode(errors="replace").strip()
    except OSError:
        return ""


def read_apparmor(sysfs_root: Path, proc: Path = Path("/proc")) -> AppArmor:
    """Read AppArmor's state. Raises nothing: a value that cannot be read counts as unknown."""
    enabled = read_text(sysfs_root / "module/apparmor/parameters/enabled")
    # With several security modules, attr/current may belong to another one. Reading it gives EINVAL if AppArmor is off.
    own = proc / "self/attr"
    label = "" if enabled == "N" else read_text(own / "apparmor/current") or read_text(own / "current")
    return AppArmor(None if not enabled else enabled == "Y", re.sub(r" \(\w+\)$", "", label.rstrip("\0\n")))
