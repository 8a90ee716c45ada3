"""AppArmor as an unprivileged process sees it, and advice where it may have refused a write of the helper.

Only the kernel's log, which only root can read, names the process and the file of a refusal. Each process can read its
own profile, and the helper's container usually has the same profile as the server's.
"""

import errno
import re
from pathlib import Path
from typing import Final

from msgspec import Struct

# What container runtimes put around a container whose pod does not say otherwise: containerd, Docker, CRI-O, Podman.
_DEFAULT: Final = re.compile(r"cri-containerd\.apparmor\.d|docker-default|crio-default.*|containers-default.*")
_LIMIT: Final = 64 * 1024  # bytes
_OURS: Final = re.compile(r"qat-.*")
SETTING: Final = (
    "give the helper's container securityContext.appArmorProfile {type: Unconfined}, as deployments/base does, "
    "or {type: Localhost, localhostProfile: qat-helper}, with apparmor/qat-helper loaded on the node"
)


class AppArmor(Struct, frozen=True):
    """Whether it is on, None where that cannot be read, and the profile of this process, "" for none."""

    enabled: bool | None = None
    profile: str = ""

    def advice(self, refusal: int) -> str:
        """Advice on the errno of a failed write to sysfs; "" where AppArmor is not the likely cause."""
        # It refuses files with EACCES, which root without capabilities gets from security modules only.
        if self.enabled is False or (refusal != errno.EACCES and not (self.enabled and refusal == errno.EPERM)):
            return ""
        if not self.enabled:
            return f"if AppArmor is on, the default profile of containers refuses every write to /sys: {SETTING}"
        return f"AppArmor is on: {self.remedy}"

    @property
    def remedy(self) -> str:
        """Why AppArmor has refused a write of the helper, and what to do."""
        if _OURS.fullmatch(self.profile):
            return (
                "if the helper is under its profile too, what that lacks is named by: dmesg | grep DENIED; "
                "it goes into /etc/apparmor.d/local/qat-helper"
            )
        own = f" (this one is under {self.profile})" if _DEFAULT.fullmatch(self.profile) else ""
        return f"the default profile of containers{own} refuses every write to /sys: {SETTING}"


def read_text(path: Path) -> str:
    """A small file of the kernel's, stripped; "" when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(_LIMIT).decode(errors="replace").strip()
    except OSError:
        return ""


def read_apparmor(sysfs_root: Path, proc: Path = Path("/proc")) -> AppArmor:
    """Read AppArmor's state. Raises nothing: a value that cannot be read is unknown."""
    enabled = read_text(sysfs_root / "module/apparmor/parameters/enabled")
    # With several security modules, attr/current may be that of another one. EINVAL when AppArmor is off.
    own = proc / "self/attr"
    label = "" if enabled == "N" else read_text(own / "apparmor/current") or read_text(own / "current")
    return AppArmor(None if not enabled else enabled == "Y", re.sub(r" \(\w+\)$", "", label.rstrip("\0\n")))
