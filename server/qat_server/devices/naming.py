"""The resource name of a VF, from the services that its PF is configured for.

Services are words joined by `;`, as in the kernel's qat/cfg_services (Documentation/ABI/testing/sysfs-driver-qat).
Their order matters neither to the device nor to the name. Services that cannot be parsed give `generic`, never an
error.
"""

import configparser
from collections.abc import Mapping
from typing import Final

from qat_server.devices.inventory import Inventory, PhysicalFunction, VirtualFunction
from qat_shared.devices import VIRTUAL
from qat_shared.pci import PciAddress
from qat_shared.resources import CRYPTO, GENERIC, SERVICES, name_of

LONGEST_NAME: Final = "asym-sym-decomp"
"""The longest name that services make: a Gen6 device takes three of them."""

_NAMED_PFS: Final = frozenset(kind.physical for kind in VIRTUAL.values() if kind.named_by_services)


def resource_names(inventory: Inventory, dev_cfgs: Mapping[PciAddress, str]) -> dict[PciAddress, str]:
    """Resource name by VF; `dev_cfgs` by PF. A VF is left out while its PF's dev_cfg is needed and not known."""
    pfs = {pf.address: pf for pf in inventory.pfs}
    names = {}
    for vf in inventory.vfs:
        pf = pfs.get(vf.pf) if vf.pf is not None else None
        config = dev_cfgs.get(pf.address) if pf is not None else None
        if config is not None or pf is None or not needs_config(pf):
            names[vf.address] = resource_name(vf, pf, config)
    return names


def resource_name(vf: VirtualFunction, pf: PhysicalFunction | None, config: str | None) -> str:
    """cy, dc, sym-dc, ... or generic. `config` is the PF's dev_cfg (debugfs), None when it is not known."""
    kind = VIRTUAL.get(vf.device_id)
    if kind is None or not kind.named_by_services or pf is None:
        return GENERIC
    if _shows_services(pf):
        return name_of_services(pf.services)
    return name_of_services(_enabled_services(config)) if config else GENERIC


def is_resource_name(name: str) -> bool:
    """Whether the name is made of our words. It also accepts words in another order."""
    return name in (GENERIC, CRYPTO) or set(name.split("-")) <= set(SERVICES)


def needs_config(pf: PhysicalFunction) -> bool:
    """Whether the names of a PF's VFs depend on its dev_cfg, which only the helper can read."""
    return pf.device_id in _NAMED_PFS and bool(pf.vfs) and not _shows_services(pf)


def name_of_services(services: str | None) -> str:
    """The name for services as in qat/cfg_services, in any order; generic for services that cannot be parsed."""
    words = [word.strip() for word in (services or "").split(";")]
    if len(set(words)) != len(words) or not set(words) <= set(SERVICES):
        return GENERIC
    return name_of(words)


def _shows_services(pf: PhysicalFunction) -> bool:
    return pf.state == "up" and pf.services is not None


def _enabled_services(config: str) -> str | None:
    """ServicesEnabled in section [GENERAL] of a dev_cfg.

    The text consists of `[section]` and `key = value` lines (the kernel's adf_cfg.c).
    """
    parser = configparser.RawConfigParser(
        delimiters=("=",),
        comment_prefixes=("#", ";"),
        inline_comment_prefixes=("#",),  # not `;`, which separates services
        strict=False,
        allow_no_value=True,
        default_section="",
    )
    parser.optionxform = str  # type: ignore[assignment, method-assign]  # keep the kernel's spelling of keys
    try:
        # configparser would join an indented line to the value of the line before.
        parser.read_string("\n".join(line.strip() for line in config.splitlines()))
    except configparser.Error:
        return None
    return parser.get("GENERAL", "ServicesEnabled", fallback=None)
