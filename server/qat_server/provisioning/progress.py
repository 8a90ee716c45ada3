"""How far the provisioning of one PF is: what status, metrics and the log show of it."""

from enum import StrEnum

from msgspec import Struct


class Stage(StrEnum):
    """Where a PF is on the way to what is wanted of it."""

    DONE = "done"
    WORKING = "working"
    WAITING = "waiting"  # until nobody uses its VFs any more
    BUSY = "busy"  # the helper says so: in use after all, or an operation has not ended yet; tried again
    FAILED = "failed"  # and tried again, unless the reason says otherwise
    IMPOSSIBLE = "impossible"  # it is left as it is


class Progress(Struct, frozen=True):
    """One PF. `steps` are those to come; `held_by` who is waited for, each once; `reason` is "" while all is well."""

    stage: Stage
    wanted: str = ""
    steps: tuple[str, ...] = ()
    held_by: tuple[str, ...] = ()
    reason: str = ""
