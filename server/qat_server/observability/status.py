"""What the server knows at one moment: `State`, filled by the run loop, and `Status`, what /status shows of it.

Both are immutable. `status_from` is pure; metrics.py reads the same State, so nothing is counted twice.
"""

from collections.abc import Mapping

import msgspec
from msgspec import Struct, field

from qat_server.devices.inventory import Inventory, Listing
from qat_server.provisioning.progress import Progress
from qat_shared import VERSION
from qat_shared.pci import PciAddress


class EndpointState(Struct, frozen=True):
    """One resource and the kubelet: registered now, how often so far, and why not (the last error, "" for none)."""

    registered: bool = False
    registrations: int = 0
    error: str = ""


class HelperState(Struct, frozen=True):
    """The helper as last heard of; `audit_*` is its audit log's head, and how that last failed to continue it.

    `sandbox` as in State.
    """

    connected: bool = False
    version: str = ""
    error: str = ""
    audit_sequence: int = 0
    audit_hash: str = ""
    audit_broken: str = ""
    sandbox: Mapping[str, str] = {}


class State(Struct, frozen=True, kw_only=True):
    """One moment of the run loop. Addresses are of VFs but for `unhealthy`, `heartbeats` and `provisioning`: PFs.

    `names`: resource by VF. `foreign`: driver that somebody else bound. `failures`: why it could not be bound.
    `held`: the pod that holds it. `not_ready`: reasons, none when ready. `sandbox`: by layer, what is missing of it.
    """

    inventory: Inventory
    listing: Listing = field(default_factory=dict)
    names: Mapping[PciAddress, str] = field(default_factory=dict)
    unhealthy: Mapping[PciAddress, str] = field(default_factory=dict)
    heartbeats: Mapping[PciAddress, bool] = field(default_factory=dict)
    endpoints: Mapping[str, EndpointState] = field(default_factory=dict)
    helper: HelperState = HelperState()
    foreign: Mapping[PciAddress, str] = field(default_factory=dict)
    failures: Mapping[PciAddress, str] = field(default_factory=dict)
    held: Mapping[PciAddress, str] = field(default_factory=dict)
    provisioning: Mapping[PciAddress, Progress] = field(default_factory=dict)
    provisioning_error: str = ""
    not_ready: tuple[str, ...] = ()
    uevents: int = 0
    uevent_overruns: int = 0
    sandbox: Mapping[str, str] = {}


class PfStatus(Struct, frozen=True):
    """One PF; `vfs` counts those enabled, `reason` says why it is not healthy."""

    address: str
    device: str
    driver: str
    numa_node: int | None
    state: str
    services: str
    total_vfs: int
    vfs: int
    reason: str


class VfStatus(Struct, frozen=True):
    """One VF; `resource` is "" when it is not listed, `reason` why it is not healthy or not listed."""

    address: str
    device: str
    pf: str
    driver: str
    numa_node: int | None
    resource: str
    listed: bool
    reason: str
    in_use: bool | None
    pod: str


class ResourceStatus(Struct, frozen=True):
    """One resource (without its namespace) as the kubelet is told of it."""

    name: str
    capacity: int
    allocatable: int
    registered: bool
    registrations: int
    error: str


class ProvisioningStatus(Struct, frozen=True):
    """How far one PF is: `stage` is done, working, waiting, busy, failed or impossible; `held_by` who is waited for."""

    pf: str
    stage: str
    wanted: str
    steps: tuple[str, ...]
    held_by: tuple[str, ...]
    reason: str


class Status(Struct, frozen=True):
    """The whole of /status."""

    version: str
    ready: bool
    not_ready: tuple[str, ...]
    helper: HelperState
    pfs: tuple[PfStatus, ...]
    vfs: tuple[VfStatus, ...]
    resources: tuple[ResourceStatus, ...]
    problems: tuple[str, ...]
    cut: tuple[str, ...]
    provisioning: tuple[ProvisioningStatus, ...] = ()
    provisioning_error: str = ""
    sandbox: Mapping[str, str] = {}


def status_from(state: State) -> Status:
    """The status of a moment: all lists in the order of addresses or names."""
    return Status(
        version=VERSION,
        ready=not state.not_ready,
        not_ready=state.not_ready,
        helper=state.helper,
        pfs=_pfs(state),
        vfs=_vfs(state),
        resources=_resources(state),
        problems=tuple(
            f"{problem.address}: {problem.text}" if problem.address else problem.text
            for problem in state.inventory.problems
        ),
        cut=tuple(str(address) for address in state.inventory.cut),
        provisioning=tuple(
            ProvisioningStatus(str(pf), each.stage, each.wanted, each.steps, each.held_by, each.reason)
            for pf, each in sorted(state.provisioning.items())
        ),
        provisioning_error=state.provisioning_error,
        sandbox=state.sandbox,
    )


def no_vfs_hint(pfs: int) -> str:
    """What to do on a node without VFs that has so many PFs."""
    if pfs:
        return "enable them on a PF (--provisioning-config, or sriov_numvfs by hand)"
    return (
        "no PF either: load the PFs' kernel driver, name its VFs' in --kernel-vf-drivers; qat-plugin doctor says more"
    )


def encode(status: Status) -> bytes:
    """The JSON of /status."""
    return msgspec.json.encode(status) + b"\n"


def decode(text: bytes) -> Status:
    """Read /status, also that of a version with more fields. Raises msgspec.MsgspecError or UnicodeDecodeError."""
    return msgspec.json.decode(text, type=Status)


def _pfs(state: State) -> tuple[PfStatus, ...]:
    return tuple(
        PfStatus(
            address=str(pf.address),
            device=f"{pf.device_id:04x}",
            driver=pf.driver or "",
            numa_node=pf.numa_node,
            state=pf.state or "",
            services=pf.services or "",
            total_vfs=pf.total_vfs,
            vfs=len(pf.vfs),
            reason=state.unhealthy.get(pf.address, ""),
        )
        for pf in state.inventory.pfs
    )


def _vfs(state: State) -> tuple[VfStatus, ...]:
    listed = {device.address: (name, device) for name, devices in state.listing.items() for device in devices}
    known = {vf.address: vf for vf in state.inventory.vfs}
    statuses = []
    for address in sorted({*listed, *known}):  # a listed VF may have vanished
        name, device = listed.get(address, (state.names.get(address, ""), None))
        vf = known.get(address)
        pf = vf.pf if vf else device.pf if device else None
        reason = device.reason if device else ""
        if not reason and address in state.failures:
            reason = state.failures[address]
        if not reason and address in state.foreign:
            reason = f"left alone: bound to {state.foreign[address]}"
        statuses.append(
            VfStatus(
                address=str(address),
                device=f"{vf.device_id:04x}" if vf else "",
                pf=str(pf) if pf else "",
                driver=(vf.driver or "") if vf else "",
                numa_node=vf.numa_node if vf else device.numa_node if device else None,
                resource=name,
                listed=device is not None,
                reason=reason,
                in_use=vf.in_use if vf else None,
                pod=state.held.get(address, ""),
            )
        )
    return tuple(statuses)


def _resources(state: State) -> tuple[ResourceStatus, ...]:
    statuses = []
    for name in sorted({*state.listing, *state.endpoints}):
        devices = state.listing.get(name, ())
        endpoint = state.endpoints.get(name, EndpointState())
        statuses.append(
            ResourceStatus(
                name=name,
                capacity=len(devices),
                allocatable=sum(device.healthy for device in devices),
                registered=endpoint.registered,
                registrations=endpoint.registrations,
                error=endpoint.error,
            )
        )
    return tuple(statuses)
