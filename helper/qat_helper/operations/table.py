"""The table of operations, one row each: everything that root does for a client. Nothing else can be requested.

To audit the helper, read this table, then the functions that it names (each module says what it touches), then
policy.py. dispatch.py takes every request through the same steps: operation allowed, the row's rule, no earlier
operation on the same device, the audit log, the function (in a child process), the audit log.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, Generic, TypeVar

from msgspec import Struct

from qat_helper.errors import PENDING_HEAD, OperationError
from qat_helper.operations.binding import bind_driver, release_driver
from qat_helper.operations.kubelet import open_pod_resources, prepare_socket_directory
from qat_helper.operations.node import Node, Outcome
from qat_helper.operations.provisioning import set_auto_reset, set_num_vfs, set_pm_idle, set_services
from qat_helper.operations.reading import read_device_config, read_heartbeat
from qat_helper.operations.registration import register_resource
from qat_helper.policy import Policy
from qat_shared import VERSION
from qat_shared.messages import (
    PROTOCOL,
    AnyRequest,
    BindDriver,
    ErrorCode,
    Hello,
    OpenPodResources,
    PrepareSocketDirectory,
    ReadDeviceConfig,
    ReadHeartbeat,
    RegisterResource,
    ReleaseDriver,
    Request,
    SetAutoReset,
    SetNumVfs,
    SetPmIdle,
    SetServices,
    Welcome,
)

R = TypeVar("R", bound=Request)

DEADLINE: Final = 5.0
MAX_CHILDREN: Final = 21
"""Of all operations together. A child takes 2 MiB of the helper's container, whose manifest has a memory limit."""
LONG: Final = 15.0
"""The kernel takes a second to remove VFs, and loads firmware each time a PF goes up. The kubelet connects to an
endpoint before it answers Register, and waits ten seconds for that."""
PF: Final = "pf"
"""In the column `exclusive`: a PF with all its VFs. It also excludes driver operations on those VFs."""


class Operation(Struct, Generic[R], frozen=True):
    """One row.

    `rule` raises OperationError when policy forbids the request; the function checks the rules that need the device.
    `exclusive` names the work of which a device takes one at a time (None: any number). `audited`: an audit line before
    and one after; otherwise the operation is only counted. `max_children` limits the child processes of this operation;
    0: it never blocks and needs no child. `deadline`: seconds. `least`: the children that this operation can always
    have, so that others that are blocked cannot starve it.
    """

    request: type[R]
    rule: Callable[[Policy, R], None]
    function: Callable[[Node, R], Outcome]
    exclusive: str | None
    audited: bool
    max_children: int
    deadline: float = DEADLINE
    least: int = 1

    @property
    def name(self) -> str:
        """The request's name, as in the audit log and the policy file."""
        return self.request.__name__


def _hello(node: Node, request: Hello) -> Outcome:
    if request.protocol != PROTOCOL:
        raise OperationError(
            ErrorCode.PROTOCOL,
            f"the helper uses protocol {PROTOCOL} (version {VERSION}), the server protocol {request.protocol} "
            f"(version {request.version}): install the same version of both",
        )
    operations = tuple(sorted(node.policy.operations))
    welcome = Welcome(
        id=request.id,
        audit=PENDING_HEAD,
        protocol=PROTOCOL,
        version=VERSION,
        operations=operations,
        sandbox=node.sandbox,
    )
    return Outcome(welcome)


def _address(
    policy: Policy,
    request: ReleaseDriver | ReadHeartbeat | ReadDeviceConfig | SetServices | SetPmIdle | SetAutoReset | SetNumVfs,
) -> None:
    policy.check_address(request.address)


def _address_and_driver(policy: Policy, request: BindDriver) -> None:
    policy.check_address(request.address)
    policy.check_driver(request.driver)


def _directory(policy: Policy, request: PrepareSocketDirectory) -> None:
    policy.check_directory(request.directory)


def _resource(policy: Policy, request: RegisterResource) -> None:
    policy.check_resource(request.resource)


def _no_rule(policy: Policy, request: Request) -> None:
    """The request holds nothing that policy restricts."""


# fmt: off
_TABLE: Final[tuple[Operation[Any], ...]] = (
    #         request                 rule                 function                  exclusive    audited  max_children
    Operation(Hello,                  _no_rule,            _hello,                   None,        False,   0),
    Operation(BindDriver,             _address_and_driver, bind_driver,              "driver",    True,    16),
    Operation(ReleaseDriver,          _address,            release_driver,           "driver",    True,    4),
    Operation(ReadHeartbeat,          _address,            read_heartbeat,           "heartbeat", False,   8, least=4),
    Operation(ReadDeviceConfig,       _address,            read_device_config,       "dev_cfg",   False,   2),
    Operation(SetServices,            _address,            set_services,             PF,          True,    16, LONG),
    Operation(SetPmIdle,              _address,            set_pm_idle,              PF,          True,    16, LONG),
    Operation(SetAutoReset,           _address,            set_auto_reset,           PF,          True,    16),
    Operation(SetNumVfs,              _address,            set_num_vfs,              PF,          True,    16, LONG),
    Operation(PrepareSocketDirectory, _directory,          prepare_socket_directory, "directory", True,    1),
    Operation(RegisterResource,       _resource,           register_resource,        None,        True,    2, LONG),
    Operation(OpenPodResources,       _no_rule,            open_pod_resources,       None,        True,    4),
)
# fmt: on

OPERATIONS: Final[Mapping[type[AnyRequest], Operation[Any]]] = MappingProxyType({row.request: row for row in _TABLE})
NAMES: Final = frozenset(row.name for row in _TABLE if row.request is not Hello)
"""The operations that a policy can restrict. Hello is always allowed."""


def deadline_of(request: AnyRequest) -> float:
    """Seconds after which the client receives a timed-out Failure."""
    wait_ms = request.wait_ms if isinstance(request, RegisterResource | OpenPodResources) else 0
    return OPERATIONS[type(request)].deadline + wait_ms / 1000
