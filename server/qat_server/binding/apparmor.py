"""AppArmor as a process without privileges sees it, and what to do where it may have refused a write of the helper.

Which process it refused which file stands in the kernel's log, which only root reads. Each process can read its own
profile, and the helper's container is mostly started as the server's is.
"""

import errno
import re
from pathlib import Path
from typing import Final

from msgspec import Struct

from qat_server.devices.small_file import read_text

# What container runtimes put around a container whose pod does not say otherwise: containerd, Docker, CRI-O, Podman.
_DEFAULT: Final = re.compile(r"cri-containerd\.apparmor\.d|docker-default|crio-default.*|containers-default.*")
_OURS: Final = re.compile(r"qat-.*")
SETTING: Final = (
    "give the helper's container securityContext.appArmorProfile {type: Unconfined}, as deployments/base does, "
    "or {type: Localhost, localhostProfile: qat-helper}, with apparmor/qat-helper loaded on the node"
)


class AppArmor(Struct, frozen=True):
    """Whether it is on, None where that cannot be read; `profile` is that of the process that looks, "" for none."""

    enabled: bool | None = None
    profile: str = ""

    def advice(self, refusal: int) -> str:
        """What to do about an errno of a write to sysfs; "" where AppArmor is not the likely cause."""
        # It refuses files with EACCES, which root without capabilities gets from security modules only.
        if self.enabled is False or (refusal != errno.EACCES and not (self.enabled and refusal == errno.EPERM)):
            return ""
        if not self.enabled:
            return f"if AppArmor is on, the default profile of containers refuses every write to /sys: {SETTING}"
        return f"AppArmor is on: {self.remedy}"

    @property
    def remedy(self) -> str:
        """Where it is on and has refused a write of the helper: why it has, and what to do."""
        if _OURS.fullmatch(self.profile):
            return (
                "if the helper is under its profile too, what that lacks is named by: dmesg | grep DENIED; "
                "it goes into /etc/apparmor.d/local/qat-helper"
            )
        own = f" (this one is under {self.profile})" if _DEFAULT.fullmatch(self.profile) else ""
        return f"the default profile of containers{own} refuses every write to /sys: {SETTING}"


def look(sysfs_root: Path, proc: Path = Path("/proc")) -> AppArmor:
    """As it is now. Nothing is raised: what cannot be read is not known."""
    enabled = read_text(sysfs_root / "module/apparmor/parameters/enabled")
    # attr/apparmor where several security modules work; the older place may then tell of another. EINVAL when off.
    own = proc / "self/attr"
    label = "" if enabled == "N" else read_text(own / "apparmor/current") or read_text(own / "current")
    return AppArmor(None if not enabled else enabled == "Y", re.sub(r" \(\w+\)$", "", label.rstrip("\0\n")))
