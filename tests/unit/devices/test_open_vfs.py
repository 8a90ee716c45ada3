"""The use of VFs is read in a thread, once for all requests within a second."""

import asyncio
import threading
from pathlib import Path

from qat_server.devices.discovery import discover
from qat_server.devices.inventory import Inventory
from qat_server.devices.open_vfs import MAX_AGE, OpenVfs, with_open_vfs
from support.conditions import until
from support.sysfs_tree import SysfsTree

EMPTY = Inventory(pfs=(), vfs=(), cut=(), problems=())


async def test_the_event_loop_continues_and_concurrent_requests_share_a_reading() -> None:
    begun, may_end, now, reads = threading.Event(), threading.Event(), [0.0], []

    def read(root: Path, inventory: Inventory) -> Inventory:
        reads.append(root)
        begun.set()
        assert may_end.wait(120)
        return Inventory(inventory.pfs, inventory.vfs, inventory.cut, inventory.problems)

    open_vfs = OpenVfs(Path("/sys"), lambda: now[0], read)
    asking = [asyncio.create_task(open_vfs.refreshed(EMPTY)) for _ in range(3)]
    await until(begun.is_set)
    may_end.set()
    answers = await asyncio.gather(*asking)
    assert reads == [Path("/sys")]
    assert all(answer is answers[0] for answer in answers)

    now[0] += MAX_AGE
    await open_vfs.refreshed(EMPTY)
    assert len(reads) == 2, "it is read again after a second"
    await open_vfs.refreshed(Inventory((), (), (), ()))
    assert len(reads) == 3, "another inventory is read again too"


def test_only_use_on_vfio_pci_is_read_again(tmp_path: Path) -> None:
    tree = SysfsTree(tmp_path / "sys")
    tree.pf("6b:00.0")
    for number, driver in enumerate(("vfio-pci", "vfio-pci", "4xxxvf"), 1):
        tree.vf(f"6b:00.{number}", "6b:00.0", driver)
    before = discover(tree.root, ("4xxxvf",), 64)
    assert [vf.in_use for vf in before.vfs] == [False, False, None]
    for number in (1, 3):
        tree.write(f"6b:00.{number}", "enable", "1\n")
    tree.remove("6b:00.2")
    after = with_open_vfs(tree.root, before)
    assert [vf.in_use for vf in after.vfs] == [True, False, None], "a VF that cannot be read keeps its value"
