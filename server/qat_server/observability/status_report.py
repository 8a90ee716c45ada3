"""The conversion of a `State` to the `Status` that /status shows. Pure."""

from qat_server.kubelet.endpoint import EndpointState
from qat_server.observability.readiness import not_ready
from qat_server.observability.state import State
from qat_server.observability.status_format import PfStatus, ProvisioningStatus, ResourceStatus, Status, VfStatus
from qat_shared import VERSION


def status_from(state: State) -> Status:
    """The status for a snapshot; lists are sorted by address or name."""
    reasons = not_ready(state)
    return Status(
        version=VERSION,
        ready=not reasons,
        not_ready=reasons,
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
    for address in sorted({*listed, *known}):  # a listed VF may have disappeared
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
