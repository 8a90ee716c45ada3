"""The checks of doctor: from observations and settings to findings with advice. Pure.

Each check is a function of `NodeObservations` and `Settings`. They run in the order of a manual diagnosis: devices, PF
drivers, SR-IOV, IOMMU, VF driver, security modules, kubelet, helper.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from qat_server.command_line.doctor.findings import Finding, Level
from qat_server.command_line.doctor.observations import NO_HEARTBEAT, NodeObservations, QatFunction
from qat_server.command_line.settings import Settings
from qat_server.kubelet.registration.directories import Registration
from qat_shared.devices import PHYSICAL, VIRTUAL
from qat_shared.messages import DPDK_DRIVERS, DpdkDriver

# The kernel modules of the PF drivers. c4xxx and d15xx are only in Intel's own driver package.
_MODULES: Final = {
    "dh895xcc": "qat_dh895xcc",
    "c3xxx": "qat_c3xxx",
    "c6xx": "qat_c62x",
    "4xxx": "qat_4xxx",
    "420xx": "qat_420xx",
    "6xxx": "qat_6xxx",
}
_DENYLISTED: Final = frozenset({"dh895xccvf", "c3xxxvf", "c6xxvf"})
_DENYLIST_SINCE: Final = (5, 9)  # vfio_pci_dev_in_denylist
_SHOWN: Final = 4


def run_checks(node: NodeObservations, settings: Settings) -> list[Finding]:
    """Run all checks and return their findings in order."""
    return [finding for check in _CHECKS for finding in check(node, settings)]


def _devices(node: NodeObservations, settings: Settings) -> Iterator[Finding]:
    check = "devices"
    for problem in node.problems:
        advice = "check dmesg for messages about this device"
        yield Finding(check, Level.PROBLEM, f"cannot read a device: {problem}", advice)
    if not node.functions:
        ids = " ".join(f"{number:04x}" for number in sorted({*PHYSICAL, *VIRTUAL}))
        yield Finding(
            check,
            Level.PROBLEM,
            "there is no QAT device on any PCI bus",
            f"QAT devices have vendor ID 8086 and one of these device IDs: {ids} (list them with lspci -Dnd 8086:). "
            "For a VM, pass a VF through to it",
        )
        return
    kinds: defaultdict[tuple[int, bool], list[QatFunction]] = defaultdict(list)
    for function in node.functions:
        kinds[function.device_id, function.physical].append(function)
    for (number, physical), found in sorted(kinds.items()):
        count = _counted(found, "PF" if physical else "VF")
        yield Finding(check, Level.OK, f"{count} 8086:{number:04x}: {_list(found)}")
    wanted = {_vf_driver(function) for function in node.functions}
    if missing := sorted(wanted.difference(settings.kernel_vf_drivers)):
        drivers = ",".join((*settings.kernel_vf_drivers, *missing))
        yield Finding(
            check,
            Level.PROBLEM if not wanted.intersection(settings.kernel_vf_drivers) else Level.NOTE,
            f"devices of {', '.join(missing)} were found but are not served",
            f"to serve them: --kernel-vf-drivers={drivers}",
        )


def _pf_drivers(node: NodeObservations, _: Settings) -> Iterator[Finding]:
    check = "PF driver"
    for function in node.functions:
        if not function.physical:
            continue
        driver = PHYSICAL[function.device_id].driver
        if function.driver == driver:
            yield Finding(check, Level.OK, f"{function.address} is bound to {driver}")
            continue
        module = _MODULES.get(driver)
        load = f"run modprobe {module}" if module else f"install Intel's driver package, which contains {driver}"
        yield Finding(
            check,
            Level.PROBLEM,
            f"{function.address} is {_bound_to(function.driver)}; expected {driver}",
            f"{load}; if it is loaded, dmesg shows why it does not bind the device (often its firmware is missing)",
        )


def _sriov(node: NodeObservations, _: Settings) -> Iterator[Finding]:
    check = "SR-IOV"
    for function in node.functions:
        if not function.physical:
            continue
        if not function.total_vfs:
            advice = "enable SR-IOV in the machine's firmware setup"
            yield Finding(check, Level.PROBLEM, f"SR-IOV is not available for {function.address}", advice)
        elif not function.num_vfs:
            path = f"/sys/bus/pci/devices/{function.address}"
            yield Finding(
                check,
                Level.PROBLEM,
                f"{function.address} has 0 of {function.total_vfs} VFs enabled",
                f"let the plugin enable them (--provisioning-config), or run: "
                f"cat {path}/sriov_totalvfs | sudo tee {path}/sriov_numvfs",
            )
        else:
            count = f"{function.num_vfs} of {function.total_vfs}"
            yield Finding(check, Level.OK, f"{function.address} has {count} VFs enabled")


def _iommu(node: NodeObservations, _: Settings) -> Iterator[Finding]:
    check = "IOMMU"
    if not node.groups:
        if node.noiommu:
            advice = "for tests only: without an IOMMU, a device can access all memory"
            yield Finding(check, Level.NOTE, "there is no IOMMU, but VFIO is allowed to work without one", advice)
            return
        advice = "enable it in the firmware setup (VT-d, AMD-Vi) and on the kernel command line (intel_iommu=on)"
        if "intel_iommu=on" in node.command_line.split():
            advice = "intel_iommu=on is already set: enable VT-d in the machine's firmware setup"
        yield Finding(check, Level.PROBLEM, "the IOMMU is off: /sys/kernel/iommu_groups is empty", advice)
        return
    yield Finding(check, Level.OK, f"the IOMMU is on ({len(node.groups)} groups)")
    for function in node.functions:
        if function.physical or function.iommu_group is None:
            continue
        others = [name for name in node.groups.get(function.iommu_group, ()) if name != str(function.address)]
        if others:
            yield Finding(
                check,
                Level.NOTE,
                f"{function.address} shares IOMMU group {function.iommu_group} with {_words(others)}",
                "all devices of a group have one user. The slot's bridge lacks ACS; try another slot or other firmware",
            )


def _dpdk_driver(node: NodeObservations, settings: Settings) -> Iterator[Finding]:
    check = "VF driver"
    wanted = settings.dpdk_driver
    if wanted not in node.drivers:
        how = "run modprobe vfio-pci" if wanted is DpdkDriver.VFIO_PCI else "build it from dpdk-kmods and load it"
        advice = f"{how}; also load it at boot (/etc/modules-load.d)"
        yield Finding(check, Level.PROBLEM, f"{wanted} is not loaded", advice)
    else:
        yield Finding(check, Level.OK, f"{wanted} is loaded")
        if wanted is DpdkDriver.VFIO_PCI and not node.vfio_device:
            advice = "this is normal in a container that does not mount the host's /dev; elsewhere, run modprobe vfio"
            yield Finding(check, Level.NOTE, "/dev/vfio/vfio is not visible here", advice)
    vfs = [function for function in node.functions if not function.physical]
    by_driver: defaultdict[str | None, list[QatFunction]] = defaultdict(list)
    for vf in vfs:
        by_driver[vf.driver].append(vf)
    for driver, found in sorted(by_driver.items(), key=lambda item: item[0] or ""):
        own = {None, *(VIRTUAL[vf.device_id].driver for vf in found), *DPDK_DRIVERS}
        if driver == wanted:
            yield Finding(check, Level.OK, f"{_counted(found, 'VF')} bound to {driver}")
        elif driver in own:
            advice = "the plugin binds them when it runs"
            yield Finding(check, Level.NOTE, f"{_counted(found, 'VF')} {_bound_to(driver)}; expected {wanted}", advice)
        else:
            yield Finding(
                check,
                Level.PROBLEM,
                f"{_list(found)} {'is' if len(found) == 1 else 'are'} bound to {driver}, and not by the plugin",
                "the plugin does not rebind such VFs; to serve them: driverctl unset-override, or write the address to "
                f"/sys/bus/pci/drivers/{driver}/unbind",
            )
    denied = [vf for vf in vfs if VIRTUAL[vf.device_id].driver in _DENYLISTED]
    if denied and wanted is DpdkDriver.VFIO_PCI and node.kernel >= _DENYLIST_SINCE and not node.denylist_disabled:
        yield Finding(
            check,
            Level.PROBLEM,
            f"vfio-pci refuses devices older than Gen4 ({_list(denied)}), which are on its deny list",
            'echo "options vfio-pci disable_denylist=1" | sudo tee /etc/modprobe.d/vfio-pci.conf, then reload the '
            "module; first read Intel's advisory on these devices",
        )


def _confinement(node: NodeObservations, _: Settings) -> Iterator[Finding]:
    check = "security module"
    apparmor = node.apparmor
    if node.refused and apparmor.enabled:
        text = f"AppArmor is on, and the helper was not permitted to bind {_words(node.refused)} (Permission denied)"
        yield Finding(check, Level.PROBLEM, text, apparmor.remedy)
    elif apparmor.enabled:
        advice = f"if binding fails with Permission denied, this is the cause: {apparmor.remedy}"
        yield Finding(check, Level.NOTE, "AppArmor is on", advice)
    if node.selinux_enforcing:
        advice = "the containers need a type with access to the kubelet's sockets and /sys: container_device_plugin_t"
        yield Finding(check, Level.NOTE, "SELinux is enforcing", advice)
    if not apparmor.enabled and not node.selinux_enforcing:
        yield Finding(check, Level.OK, "neither AppArmor nor SELinux was found to be active")


def _kubelet(node: NodeObservations, settings: Settings) -> Iterator[Finding]:
    check = "kubelet"
    ours = str(settings.kubelet_dir)
    others = [root for root in node.kubelet_roots if root != ours]
    if others and ours not in node.kubelet_roots:
        yield Finding(
            check,
            Level.PROBLEM,
            f"the kubelet's --root-dir is {_words(others)}, not {ours}",
            f"pass --kubelet-dir={others[0]} to qat-helper and to qat-plugin (in pods, also mount that directory)",
        )
    directory = settings.socket_directory
    match node.plugin_directory:
        case "open":
            yield Finding(check, Level.OK, f"{directory} exists and is writable")
        case "closed":
            advice = "the helper gives the server's user access when the server starts; run doctor as that user"
            yield Finding(check, Level.NOTE, f"{directory} is not accessible to the current user", advice)
        case "missing":
            advice = (
                "the helper creates it when the server starts; otherwise, is --kubelet-dir the kubelet's --root-dir?"
            )
            yield Finding(check, Level.NOTE, f"{directory} does not exist", advice)


def _helper(node: NodeObservations, settings: Settings) -> Iterator[Finding]:
    check = "helper"
    helper = node.helper
    if helper.error:
        yield Finding(
            check,
            Level.PROBLEM,
            helper.error,
            "start qat-helper, and run doctor as the server's user (the helper accepts no other)",
        )
        return
    yield Finding(check, Level.OK, f"the helper answers, version {helper.version}")
    registers = ("RegisterResource",) if settings.registration is Registration.KUBELET_SOCKET else ()
    for operation in ("BindDriver", "ReadHeartbeat", *registers, "OpenPodResources", "PrepareSocketDirectory"):
        if operation not in helper.operations:
            advice = "if this is unintended, add it to operations in the helper's policy file"
            yield Finding(check, Level.NOTE, f"the helper's policy forbids {operation}", advice)
    for pf, why in sorted(helper.heartbeats.items()):
        if why == NO_HEARTBEAT:
            advice = "its VFs stay Unhealthy until it does: enable qat/auto_reset, or set qat/state to down, then up"
            yield Finding(check, Level.PROBLEM, f"no heartbeat from {pf}: {why}", advice)
        elif why:
            advice = "without heartbeats, health depends only on the PF's state"
            yield Finding(check, Level.NOTE, f"no heartbeat from {pf}: {why}", advice)
        else:
            yield Finding(check, Level.OK, f"{pf} answers heartbeat queries")


_CHECKS: Final[tuple[Callable[[NodeObservations, Settings], Iterator[Finding]], ...]] = (
    _devices,
    _pf_drivers,
    _sriov,
    _iommu,
    _dpdk_driver,
    _confinement,
    _kubelet,
    _helper,
)


def _vf_driver(function: QatFunction) -> str:
    """The kernel driver of a VF, or of a PF's VFs."""
    kind = VIRTUAL.get(function.device_id)
    return kind.driver if kind else f"{PHYSICAL[function.device_id].driver}vf"


def _bound_to(driver: str | None) -> str:
    return f"bound to {driver}" if driver else "not bound to a driver"


def _counted(functions: Sequence[QatFunction], kind: str) -> str:
    return f"{len(functions)} {kind}{'' if len(functions) == 1 else 's'}"


def _list(functions: Sequence[QatFunction]) -> str:
    return _words([str(function.address) for function in functions])


def _words(words: Sequence[str]) -> str:
    more = len(words) - _SHOWN
    return ", ".join(words[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
