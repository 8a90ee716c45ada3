"""Carrying out one step of a plan: the helper's operation for it, and what to say of one that failed."""

import errno
from collections.abc import Callable
from typing import Final, Protocol

from qat_server.helper_client.client import HelperError
from qat_server.provisioning.plan import SetAutoReset, SetNumVfs, SetPmIdle, SetServices, Step
from qat_shared import messages
from qat_shared.messages import AnyRequest, ErrorCode, Provisioned, Service

_REASON: Final = "as the provisioning configuration wants"


class Provisioning(Protocol):
    """What is needed of a HelperClient."""

    async def provision(self, make: Callable[[int], AnyRequest]) -> Provisioned:
        """Raises HelperError."""


async def carry_out(helper: Provisioning, step: Step) -> Provisioned:
    """Have the helper do it. Raises HelperError."""
    address = step.address
    if isinstance(step, SetServices):
        services = tuple(map(Service, step.services))
        return await helper.provision(
            lambda number: messages.SetServices(id=number, address=address, services=services, reason=_REASON)
        )
    if isinstance(step, SetPmIdle):
        return await helper.provision(
            lambda number: messages.SetPmIdle(
                id=number, address=address, on=step.on, stay_down=step.stay_down, reason=_REASON
            )
        )
    if isinstance(step, SetAutoReset):
        return await helper.provision(
            lambda number: messages.SetAutoReset(id=number, address=address, on=step.on, reason=_REASON)
        )
    return await helper.provision(
        lambda number: messages.SetNumVfs(id=number, address=address, count=step.count, reason=_REASON)
    )


def is_refused(step: Step, error: HelperError) -> bool:
    """Whether the kernel will not have these services, however often it is asked."""
    return isinstance(step, SetServices) and error.code == ErrorCode.KERNEL and error.errno == errno.EINVAL


def why(step: Step, error: HelperError) -> str:
    """One sentence for a step that failed."""
    hint = ""
    if isinstance(step, SetNumVfs) and error.errno == errno.EINVAL:
        if step.count:
            hint = "; is the IOMMU on (intel_iommu=on)? The QAT driver enables no VFs without"
        else:
            hint = "; QAT drivers before kernel 6.12 cannot remove VFs by that"
    return f"{step}: {error.message}{hint}"


def takes_vfs_away(step: Step) -> bool:
    """Whether a PF's VFs are gone after it: then it waits until nobody uses one."""
    return isinstance(step, (SetServices, SetPmIdle)) or (isinstance(step, SetNumVfs) and not step.count)
