"""Discovery of a sysfs tree, for tests of its result."""

from qat_server.devices.discovery import discover
from qat_server.devices.inventory import Inventory
from support.sysfs_tree import SysfsTree

DRIVERS = ("4xxxvf", "420xxvf")

PF, VF1, VF2, VF3 = "6b:00.0", "6b:00.1", "6b:00.2", "6b:00.3"


def discovered(tree: SysfsTree, drivers: tuple[str, ...] = DRIVERS, most: int = 64) -> Inventory:
    """A full discovery."""
    return discover(tree.root, drivers, most)


def texts(addresses: object) -> list[str]:
    """Addresses, or the addresses of functions, without domain 0000."""
    assert isinstance(addresses, tuple | list)
    return [str(one.address if hasattr(one, "address") else one).removeprefix("0000:") for one in addresses]
