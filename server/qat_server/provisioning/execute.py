"""The execution of one step of a plan by the helper, and the meaning of its failures."""

import errno
from functools import partial
from typing import Final

from qat_server.helper_client.client import HelperClient, HelperError
from qat_server.provisioning.qat_conf import Services
from qat_server.provisioning.steps import SetAutoReset, SetNumVfs, SetPmIdle, SetServices, Step
from qat_shared import messages
from qat_shared.messages import AnyRequest, ErrorCode, Provisioned, Service

_REASON: Final = "apply the provisioning configuration"


async def execute(helper: HelperClient, step: Step) -> Provisioned:
    """Have the helper carry out the step. Raises HelperError."""
    return await helper.provision(partial(_request, step))


def _request(step: Step, number: int) -> AnyRequest:
    address = step.address
    match step:
        case SetServices(services=services):
            words = tuple(map(Service, services))
            return messages.SetServices(id=number, address=address, services=words, reason=_REASON)
        case SetPmIdle(on=on, stay_down=stay_down):
            return messages.SetPmIdle(id=number, address=address, on=on, stay_down=stay_down, reason=_REASON)
        case SetAutoReset(on=on):
            return messages.SetAutoReset(id=number, address=address, on=on, reason=_REASON)
        case SetNumVfs(count=count):
            return messages.SetNumVfs(id=number, address=address, count=count, reason=_REASON)


def refused_services(step: Step, error: HelperError) -> Services | None:
    """The services that the kernel refused (EINVAL), so that a retry is pointless; None for any other failure."""
    if isinstance(step, SetServices) and error.code == ErrorCode.KERNEL and error.errno == errno.EINVAL:
        return step.services
    return None


def failure_text(step: Step, error: HelperError) -> str:
    """One sentence about a failed step, with a hint where the cause is known."""
    hint = ""
    if isinstance(step, SetNumVfs) and error.errno == errno.EINVAL:
        if step.count:
            hint = "; is the IOMMU on (intel_iommu=on)? The QAT driver cannot enable VFs without it"
        else:
            hint = "; QAT drivers before kernel 6.12 cannot remove VFs"
    return f"{step}: {error.message}{hint}"
