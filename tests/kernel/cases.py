"""The table of what is done to both kernels, the real and the emulated one, each case step by step (steps.py).

Where the two differ, the emulated kernel is wrong; docs/simulation.md lists what stays different.
"""

from typing import Final

from kernel.steps import Begin, Case, Close, End, Heartbeat, Open, Step, Write
from qat_simulation.node.description import LoneVf, Node, OtherDevice, Pf

PF: Final = "0000:6b:00.0"
VF: Final = "0000:6b:00.1"
VF2: Final = "0000:6b:00.2"
GEN6: Final = "0000:e8:00.0"
GEN2: Final = "0000:3d:00.0"
LONE: Final = "0000:a1:00.0"


def bind_by_hand(address: str, old: str, new: str) -> tuple[Step, ...]:
    return (
        Write(f"{address}/driver_override", new),
        Write(f"bus/pci/drivers/{old}/unbind", address),
        Write("bus/pci/drivers_probe", address),
    )


_GEN4 = Node(pfs=(Pf(address=PF, services="sym;asym", total_vfs=2, numa_node=0),))
_BARE = Node(pfs=(Pf(address=PF, services="sym;asym", total_vfs=2, num_vfs=0),))


def _words(path: str, *words: str) -> tuple[Step, ...]:
    return tuple(Write(path, word) for word in words)


CASES: Final[dict[str, Case]] = {
    "to vfio-pci and back": Case(
        _GEN4,
        (PF, VF, VF2),
        (
            *bind_by_hand(VF, "4xxxvf", "vfio-pci"),
            Write(f"{VF}/driver_override", "\n"),
            Write("bus/pci/drivers/vfio-pci/unbind", f"{VF}\n"),
            Write("bus/pci/drivers_probe", f"{VF}\n"),
        ),
    ),
    "bind, unbind, probe": Case(
        _GEN4,
        (VF, VF2),
        (
            Write("bus/pci/drivers/vfio-pci/bind", VF),
            Write("bus/pci/drivers/4xxxvf/bind", VF),
            Write("bus/pci/drivers/vfio-pci/unbind", VF),
            Write("bus/pci/drivers/4xxxvf/unbind", "0000:6b:1f.7"),
            Write("bus/pci/drivers/4xxxvf/unbind", VF),
            Write("bus/pci/drivers/4xxxvf/unbind", VF),
            Write("bus/pci/drivers/vfio-pci/bind", VF),
            Write("bus/pci/drivers_probe", "0000:6b:1f.7"),
            Write("bus/pci/drivers_probe", VF2),
            Write("bus/pci/drivers/4xxxvf/bind", VF),
            Write("bus/pci/drivers/4xxxvf/bind", "nonsense"),
            Write("bus/pci/drivers_probe", ""),
        ),
    ),
    "driver_override's words": Case(
        _GEN4,
        (VF,),
        (
            *_words(
                f"{VF}/driver_override", "vfio-pci", "", "x\n", "two words", "no-such-driver", "v" * 4095, "v" * 5000
            ),
            Write(f"{VF}/driver_override", "no-such-driver\n"),
            Write("bus/pci/drivers/4xxxvf/unbind", VF),
            Write("bus/pci/drivers_probe", VF),
            Write("bus/pci/drivers/4xxxvf/bind", VF),
            *_words(f"{VF}/driver_override", "\0", "4xxxvf"),
            Write("bus/pci/drivers_probe", VF),
            Write(f"{VF}/driver_override", "\n"),
        ),
    ),
    "new_id and remove_id": Case(
        _GEN4,
        (VF, VF2),
        (
            Write("bus/pci/drivers/4xxxvf/unbind", VF),
            Write("bus/pci/drivers/vfio-pci/new_id", "8086"),
            Write("bus/pci/drivers/vfio-pci/new_id", "8086 4941"),
            Write("bus/pci/drivers/vfio-pci/new_id", "8086 4941"),
            Write("bus/pci/drivers/vfio-pci/remove_id", "8086 4941"),
            Write("bus/pci/drivers/vfio-pci/remove_id", "8086 4941"),
        ),
    ),
    "sriov_numvfs": Case(
        _BARE,
        (PF, VF, VF2),
        _words(
            f"{PF}/sriov_numvfs", "x", "-1", "", "3", "0", "1", "1", "2", "2", "0x0", "0", "2 ", "2\n\n", "0\n", "65536"
        ),
    ),
    "sriov_drivers_autoprobe": Case(
        _BARE,
        (PF, VF, VF2),
        (
            *_words(f"{PF}/sriov_drivers_autoprobe", "maybe", "n", "0"),
            Write(f"{PF}/sriov_numvfs", "2"),
            Write("bus/pci/drivers_probe", VF),
            Write("bus/pci/drivers/4xxxvf/bind", VF),
            Write(f"{VF}/driver_override", "vfio-pci"),
            Write("bus/pci/drivers_probe", VF),
            Write(f"{PF}/sriov_drivers_autoprobe", "Y"),
            Write("bus/pci/drivers_probe", VF2),
            Write("bus/pci/drivers_autoprobe", "0"),
            Write("bus/pci/drivers_autoprobe", "1"),
        ),
    ),
    "qat/state": Case(
        _GEN4,
        (PF, VF),
        (
            *_words(f"{PF}/qat/state", "up", "sideways", "DOWN", "down", "down\n", "", "up\n", "up"),
            Write(f"{PF}/sriov_numvfs", "2"),
            Write(f"{PF}/qat/state", "down"),
            Write(f"{PF}/sriov_numvfs", "0"),
            Write(f"{PF}/qat/state", "down"),
            Write(f"{PF}/sriov_numvfs", "2"),
        ),
    ),
    "qat/cfg_services": Case(
        _BARE,
        (PF,),
        (
            Write(f"{PF}/qat/cfg_services", "dc"),
            Write(f"{PF}/qat/cfg_services", "nonsense"),
            Write(f"{PF}/qat/state", "down"),
            *_words(
                f"{PF}/qat/cfg_services", "sym;asym", "asym;sym", "dc;sym\n", "sym;sym", "sym;", "", "dc;dcc", "dcc"
            ),
            *_words(f"{PF}/qat/cfg_services", "asym;sym;dc", "decomp", "sym asym", "SYM", "s" * 200),
            Write(f"{PF}/qat/state", "up"),
        ),
    ),
    "Gen6's services": Case(
        Node(pfs=(Pf(address=GEN6, device="4948", services="sym;asym", total_vfs=1, num_vfs=0),)),
        (GEN6,),
        (
            Write(f"{GEN6}/qat/state", "down"),
            *_words(f"{GEN6}/qat/cfg_services", "decomp;dc;sym", "asym;sym;dc;decomp", "decomp", "dcc;dc"),
            Write(f"{GEN6}/sriov_numvfs", "1"),
        ),
    ),
    "qat/'s other words": Case(
        _BARE,
        (PF,),
        (
            *_words(f"{PF}/qat/auto_reset", "on", "off", "1", "y", "tr", "2", "", "0\n"),
            *_words(f"{PF}/qat/num_rps", "1"),
            *_words(f"{PF}/vendor", "1"),
        ),
    ),
    "before Gen4": Case(
        Node(pfs=(Pf(address=GEN2, device="37c8", services="sym;asym", total_vfs=2),)),
        (GEN2, "0000:3d:01.0", "0000:3d:01.1"),
        (Write(f"{GEN2}/sriov_numvfs", "0"), Write(f"{GEN2}/sriov_numvfs", "1")),
    ),
    "open and closed": Case(
        _GEN4,
        (PF, VF, VF2),
        (
            *bind_by_hand(VF, "4xxxvf", "vfio-pci"),
            *bind_by_hand(VF2, "4xxxvf", "vfio-pci"),
            Open(VF),
            Write(f"{PF}/sriov_numvfs", "1"),
            Write(f"{VF}/driver_override", "\n"),
            Close(VF),
            Open(VF2),
            Close(VF2),
            Write("bus/pci/drivers/vfio-pci/unbind", VF),
        ),
    ),
    **{
        f"{what} while a VF is open": Case(
            _GEN4,
            (PF, VF, VF2),
            (
                *bind_by_hand(VF, "4xxxvf", "vfio-pci"),
                Open(VF),
                Begin(write, VF),
                Write("bus/pci/drivers_probe", VF2),
                Close(VF),
                End(write.path),
            ),
        )
        for what, write in {
            "unbind": Write("bus/pci/drivers/vfio-pci/unbind", VF),
            "sriov_numvfs 0": Write(f"{PF}/sriov_numvfs", "0"),
            "down": Write(f"{PF}/qat/state", "down"),
            "unbinding the PF": Write("bus/pci/drivers/4xxx/unbind", PF),
        }.items()
    },
    "a heartbeat": Case(_BARE, (PF,), (Heartbeat(PF, -1), Heartbeat(PF, 0), Write(f"{PF}/qat/state", "down"))),
    "a PF without its driver": Case(
        _GEN4,
        (PF, VF),
        (
            Write("bus/pci/drivers/4xxx/unbind", PF),
            Write(f"{PF}/sriov_numvfs", "2"),
            Write(f"{PF}/sriov_numvfs", "0"),
            Write("bus/pci/drivers/4xxx/bind", PF),
            Write(f"{PF}/sriov_numvfs", "2"),
        ),
    ),
    "removed and found again": Case(
        Node(pfs=_GEN4.pfs, vfs=(LoneVf(address=LONE, numa_node=0),)),
        (PF, VF, VF2, LONE),
        (
            Write(f"{VF2}/remove", "0"),
            Write(f"{VF2}/remove", "1"),
            Write("bus/pci/rescan", "1"),
            Write(f"{LONE}/remove", "1"),
            Write(f"{PF}/remove", "1"),
            Write("bus/pci/rescan", "0"),
            Write("bus/pci/rescan", "1"),
        ),
    ),
    "nobody's business": Case(
        Node(
            vfs=(LoneVf(address=LONE, numa_node=1),),
            others=(OtherDevice(address="0000:b1:00.0", vendor="8086", device="1572", class_code="0b4000"),),
        ),
        (LONE, "0000:b1:00.0"),
        (
            *bind_by_hand(LONE, "4xxxvf", "vfio-pci"),
            Open(LONE),
            Close(LONE),
            Write("bus/pci/drivers_probe", "0000:b1:00.0"),
        ),
    ),
    "igb_uio": Case(
        Node(pfs=_GEN4.pfs, drivers=("igb_uio", "vfio-pci")),
        (VF,),
        (*bind_by_hand(VF, "4xxxvf", "igb_uio"), *bind_by_hand(VF, "igb_uio", "vfio-pci")),
    ),
}
