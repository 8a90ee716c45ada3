"""The provisioning progress of one PF: what status, metrics and the log show, and what the next reconcile needs."""

import math
from enum import StrEnum
from typing import Final

from msgspec import Struct

from qat_server.devices.inventory import PhysicalFunction
from qat_server.provisioning.qat_conf import Services

NOT_PUBLISHED: Final = math.inf
"""The time at which VFs were withheld while the kubelet has not been sent the list: later than any query."""


class Stage(StrEnum):
    """The provisioning stage of a PF."""

    DONE = "done"
    WORKING = "working"
    WAITING = "waiting"  # until none of its VFs is in use
    BUSY = "busy"  # reported by the helper: in use, or an earlier operation has not ended; retried
    FAILED = "failed"  # retried, unless the reason says otherwise
    IMPOSSIBLE = "impossible"  # the PF is left unchanged


class Progress(Struct, frozen=True):
    """The progress of a PF. `steps` are still to do, `held_by` are the holders of VFs that it waits for.

    `reason` is "" unless something is wrong.
    """

    stage: Stage
    wanted: str = ""
    steps: tuple[str, ...] = ()
    held_by: tuple[str, ...] = ()
    reason: str = ""


class PfRecord(Struct):
    """What the Provisioner knows of one PF from one reconcile to the next. `pf` is the PF as last planned.

    running: its steps are being carried out.
    withheld_since: when the kubelet was sent a list in which its VFs are unhealthy, NOT_PUBLISHED before that, None
        while they are not withheld. Only the answer to a later PodResources query shows that no pod was given one.
    holders_pending: the kubelet has not answered yet, so it is unknown whether pods hold its VFs.
    failure: the last failure, shown until the next attempt begins or the configuration changes.
    denied: why the helper's policy denies a step; not retried before the helper or the configuration changes.
    refused: the services that the kernel refused; not retried before the configuration changes.
    logged_wait: the pending steps that were last logged.
    """

    pf: PhysicalFunction
    progress: Progress | None = None
    running: bool = False
    withheld_since: float | None = None
    holders_pending: bool = False
    failure: tuple[Stage, str] | None = None
    denied: str = ""
    refused: Services | None = None
    logged_wait: str = ""

    @property
    def removing_vfs(self) -> bool:
        """Whether its VFs are being removed, or are about to be."""
        return self.running or self.withheld_since is not None

    @property
    def may_soon_progress(self) -> bool:
        """Whether its progress may change without the kubelet, the configuration or the helper's policy changing."""
        if self.holders_pending or self.denied or self.refused is not None or self.progress is None:
            return False
        # Attributes appear after the driver's link, so a PF without them may only seem impossible to provision.
        return self.progress.stage is not Stage.IMPOSSIBLE or self.pf.services is None
