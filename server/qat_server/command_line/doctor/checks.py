"""What the facts mean: a list of findings, each with what to do about it. Pure.

Every check is a function of `Facts` and the settings, in the order in which a person would look: the devices, the
kernel's drivers, SR-IOV, the IOMMU, VFIO, what confines, the kubelet, the helper.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from typing import Final

from msgspec import Struct

from qat_server.command_line.doctor.facts import DEAD, Facts, Function
from qat_server.command_line.settings import Settings
from qat_shared.devices import PHYSICAL, VIRTUAL
from qat_shared.messages import DPDK_DRIVERS, DpdkDriver

# The modules that bring the PF drivers; c4xxx and d15xx are not in the kernel but in Intel's own package.
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


class Level(StrEnum):
    """How much a finding matters. Only problems keep the plugin from its work."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


class Finding(Struct, frozen=True):
    """One thing found: `check` is its topic, `text` a sentence, `advice` what to do ("" when there is nothing)."""

    check: str
    level: Level
    text: str
    advice: str = ""


def diagnose(facts: Facts, settings: Settings) -> list[Finding]:
    """All findings, in the order of the checks."""
    return [finding for check in _CHECKS for finding in check(facts, settings)]


def _devices(facts: Facts, settings: Settings) -> Iterator[Finding]:
    check = "devices"
    for problem in facts.problems:
        yield Finding(check, Level.PROBLEM, f"a device cannot be read: {problem}", "look at dmesg for that device")
    if not facts.functions:
        ids = " ".join(f"{number:04x}" for number in sorted({*PHYSICAL, *VIRTUAL}))
        yield Finding(
            check,
            Level.PROBLEM,
            "no QAT device is on any PCI bus",
            f"QAT devices have vendor 8086 and one of these ids: {ids} (lspci -Dnd 8086:). In a VM, pass a VF to it",
        )
        return
    kinds: defaultdict[tuple[int, bool], list[Function]] = defaultdict(list)
    for function in facts.functions:
        kinds[function.device_id, function.physical].append(function)
    for (number, physical), found in sorted(kinds.items()):
        what = _counted(found, "PF" if physical else "VF")
        yield Finding(check, Level.OK, f"{what} 8086:{number:04x}: {_list(found)}")
    wanted = {_vf_driver(function) for function in facts.functions}
    if missing := sorted(wanted.difference(settings.kernel_vf_drivers)):
        drivers = ",".join((*settings.kernel_vf_drivers, *missing))
        yield Finding(
            check,
            Level.PROBLEM if not wanted.intersection(settings.kernel_vf_drivers) else Level.NOTE,
            f"devices of {', '.join(missing)} are there, but are not among those served",
            f"to have them served: --kernel-vf-drivers={drivers}",
        )


def _pf_drivers(facts: Facts, _: Settings) -> Iterator[Finding]:
    check = "PF driver"
    for function in facts.functions:
        if not function.physical:
            continue
        driver = PHYSICAL[function.device_id].driver
        if function.driver == driver:
            yield Finding(check, Level.OK, f"{function.address} is on {driver}")
            continue
        module = _MODULES.get(driver)
        load = f"modprobe {module}" if module else f"install Intel's driver package, which has {driver}"
        yield Finding(
            check,
            Level.PROBLEM,
            f"{function.address} is on {function.driver or 'no driver'}, not on {driver}",
            f"{load}; if it is loaded, dmesg says why it does not take the device (often its firmware is missing)",
        )


def _sriov(facts: Facts, _: Settings) -> Iterator[Finding]:
    check = "SR-IOV"
    for function in facts.functions:
        if not function.physical:
            continue
        if not function.total_vfs:
            advice = "switch on SR-IOV in the firmware setup of the machine"
            yield Finding(check, Level.PROBLEM, f"{function.address} cannot have VFs", advice)
        elif not function.num_vfs:
            path = f"/sys/bus/pci/devices/{function.address}"
            yield Finding(
                check,
                Level.PROBLEM,
                f"{function.address} has no VFs, of {function.total_vfs} that it can have",
                f"have the plugin provision it (--provisioning-config), or: "
                f"cat {path}/sriov_totalvfs | sudo tee {path}/sriov_numvfs",
            )
        else:
            yield Finding(check, Level.OK, f"{function.address} has {function.num_vfs} of {function.total_vfs} VFs")


def _iommu(facts: Facts, _: Settings) -> Iterator[Finding]:
    check = "IOMMU"
    if not facts.groups:
        if facts.noiommu:
            advice = "for tests only: a device can then reach all memory"
            yield Finding(check, Level.NOTE, "there is no IOMMU, and VFIO may work without one", advice)
            return
        advice = "switch it on in the firmware setup (VT-d, AMD-Vi), and in the kernel's command line: intel_iommu=on"
        if "intel_iommu=on" in facts.command_line.split():
            advice = "intel_iommu=on is given already: switch on VT-d in the firmware setup of the machine"
        yield Finding(check, Level.PROBLEM, "the IOMMU is off: /sys/kernel/iommu_groups is empty", advice)
        return
    yield Finding(check, Level.OK, f"the IOMMU is on ({len(facts.groups)} groups)")
    for function in facts.functions:
        if function.physical or function.iommu_group is None:
            continue
        others = [name for name in facts.groups.get(function.iommu_group, ()) if name != str(function.address)]
        if others:
            yield Finding(
                check,
                Level.NOTE,
                f"{function.address} shares IOMMU group {function.iommu_group} with {_words(others)}",
                "a group has one user: the slot's bridge lacks ACS; another slot, or its firmware, may help",
            )


def _dpdk_driver(facts: Facts, settings: Settings) -> Iterator[Finding]:
    check = "VF driver"
    wanted = settings.dpdk_driver
    if wanted not in facts.drivers:
        how = "modprobe vfio-pci" if wanted is DpdkDriver.VFIO_PCI else "build it from dpdk-kmods and load it"
        yield Finding(check, Level.PROBLEM, f"{wanted} is not loaded", f"{how}, also at boot (/etc/modules-load.d)")
    else:
        yield Finding(check, Level.OK, f"{wanted} is loaded")
        if wanted is DpdkDriver.VFIO_PCI and not facts.vfio_device:
            advice = "modprobe vfio; where this is a pod without the host's /dev, it means nothing"
            yield Finding(check, Level.NOTE, "/dev/vfio/vfio cannot be seen from here", advice)
    vfs = [function for function in facts.functions if not function.physical]
    by_driver: defaultdict[str, list[Function]] = defaultdict(list)
    for vf in vfs:
        by_driver[vf.driver or "no driver"].append(vf)
    for driver, found in sorted(by_driver.items()):
        own = {VIRTUAL[vf.device_id].driver for vf in found} | {"no driver"} | set(DPDK_DRIVERS)
        if driver == wanted:
            yield Finding(check, Level.OK, f"{_counted(found, 'VF')} on {driver}")
        elif driver in own:
            advice = "the plugin binds them when it runs"
            yield Finding(check, Level.NOTE, f"{_counted(found, 'VF')} on {driver}, not on {wanted}", advice)
        else:
            yield Finding(
                check,
                Level.PROBLEM,
                f"{_list(found)} {'is' if len(found) == 1 else 'are'} on {driver}, by somebody's decision",
                "the plugin leaves them alone; to have them served: driverctl unset-override, or echo the address into "
                f"/sys/bus/pci/drivers/{driver}/unbind",
            )
    denied = [vf for vf in vfs if VIRTUAL[vf.device_id].driver in _DENYLISTED]
    if denied and wanted is DpdkDriver.VFIO_PCI and facts.kernel >= _DENYLIST_SINCE and not facts.denylist_disabled:
        yield Finding(
            check,
            Level.PROBLEM,
            f"vfio-pci refuses devices before Gen4 ({_list(denied)}): they are on its deny list",
            'echo "options vfio-pci disable_denylist=1" | sudo tee /etc/modprobe.d/vfio-pci.conf, then load it anew; '
            "read Intel's advisory on these devices first",
        )


def _confinement(facts: Facts, _: Settings) -> Iterator[Finding]:
    check = "security module"
    apparmor = facts.apparmor
    if facts.refused and apparmor.enabled:
        text = f"AppArmor is on, and the helper was refused (Permission denied) to bind {_words(facts.refused)}"
        yield Finding(check, Level.PROBLEM, text, apparmor.remedy)
    elif apparmor.enabled:
        advice = f"if binding fails with Permission denied, this is why: {apparmor.remedy}"
        yield Finding(check, Level.NOTE, "AppArmor is on", advice)
    if facts.selinux_enforcing:
        advice = "the containers need a type that may use the kubelet's sockets and /sys: container_device_plugin_t"
        yield Finding(check, Level.NOTE, "SELinux is enforcing", advice)
    if not apparmor.enabled and not facts.selinux_enforcing:
        yield Finding(check, Level.OK, "neither AppArmor nor SELinux is in the way")


def _kubelet(facts: Facts, settings: Settings) -> Iterator[Finding]:
    check = "kubelet"
    ours = str(settings.kubelet_dir)
    others = [root for root in facts.kubelet_roots if root != ours]
    if others and ours not in facts.kubelet_roots:
        yield Finding(
            check,
            Level.PROBLEM,
            f"the kubelet's directory is {_words(others)}, not {ours}",
            f"give --kubelet-dir={others[0]} to qat-helper (in pods: mount that directory), and to qat-plugin",
        )
    directory = settings.socket_directory
    match facts.plugin_directory:
        case "open":
            yield Finding(check, Level.OK, f"{directory} is there, and may be written")
        case "closed":
            advice = "the helper opens it to the server's user when the server starts: run doctor as that user"
            yield Finding(check, Level.NOTE, f"{directory} is closed to the user who runs this", advice)
        case "missing":
            advice = "the helper makes it when the server starts; else: is --kubelet-dir the kubelet's --root-dir?"
            yield Finding(check, Level.NOTE, f"{directory} is not there", advice)


def _helper(facts: Facts, settings: Settings) -> Iterator[Finding]:
    check = "helper"
    helper = facts.helper
    if helper.error:
        yield Finding(
            check,
            Level.PROBLEM,
            helper.error,
            "start qat-helper, and run doctor as the server's user (the helper answers no other)",
        )
        return
    yield Finding(check, Level.OK, f"the helper answers, version {helper.version}")
    for operation in ("BindDriver", "ReadHeartbeat", "OpenKubeletSocket", "PrepareSocketDirectory"):
        if operation not in helper.operations:
            advice = "add it to operations in the helper's policy file, if that was not meant"
            yield Finding(check, Level.NOTE, f"the helper's policy forbids {operation}", advice)
    for pf, why in sorted(helper.heartbeats.items()):
        if why == DEAD:
            advice = "its VFs are Unhealthy until it does: switch on qat/auto_reset, or take qat/state down and up"
            yield Finding(check, Level.PROBLEM, f"no heartbeat of {pf}: {why}", advice)
        elif why:
            advice = "without it, health is the PF's state only"
            yield Finding(check, Level.NOTE, f"no heartbeat of {pf}: {why}", advice)
        else:
            yield Finding(check, Level.OK, f"the heartbeat of {pf} can be read")


_CHECKS: Final[tuple[Callable[[Facts, Settings], Iterator[Finding]], ...]] = (
    _devices,
    _pf_drivers,
    _sriov,
    _iommu,
    _dpdk_driver,
    _confinement,
    _kubelet,
    _helper,
)


def _vf_driver(function: Function) -> str:
    """The kernel VF driver that the function's VFs have, or that it has itself."""
    kind = VIRTUAL.get(function.device_id)
    return kind.driver if kind else f"{PHYSICAL[function.device_id].driver}vf"


def _counted(functions: Sequence[Function], what: str) -> str:
    return f"{len(functions)} {what}{'' if len(functions) == 1 else 's'}"


def _list(functions: Sequence[Function]) -> str:
    return _words([str(function.address) for function in functions])


def _words(words: Sequence[str]) -> str:
    more = len(words) - _SHOWN
    return ", ".join(words[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
