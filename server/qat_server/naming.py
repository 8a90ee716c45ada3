"""The name of a VF's resource: what its PF's services make of it, or generic.

Rules: a PF that is up names its VFs by qat/cfg_services; otherwise by ServicesEnabled of [GENERAL] in dev_cfg (debugfs,
drivers out of the kernel's tree); otherwise, and for kinds of VF whose services cannot differ, the name is generic.
"""

import configparser
from typing import Final

from qat_server.inventory import PhysicalFunction, VirtualFunction
from qat_shared.devices import VIRTUAL

GENERIC: Final = "generic"
# The kernel's own order (adf_cfg_services.c); the order in which a user wrote them does not count.
_ORDER: Final = ("asym", "sym", "dc", "decomp", "dcc")


def resource_name(vf: VirtualFunction, pf: PhysicalFunction | None, config: str | None) -> str:
    """The resource's name without its namespace. `config` is the text of the PF's dev_cfg, None when there is none."""
    kind = VIRTUAL.get(vf.device_id)
    if kind is None or not kind.named_by_services or pf is None:
        return GENERIC
    if not needs_config(pf):
        return name_of_services(pf.services or "")
    return name_of_services(_services_enabled(config or ""))


def needs_config(pf: PhysicalFunction) -> bool:
    """Whether sysfs does not tell this PF's services, so that dev_cfg has to be asked for."""
    named = any(kind.physical == pf.device_id and kind.named_by_services for kind in VIRTUAL.values())
    return named and not (pf.state == "up" and pf.services)


def name_of_services(services: str) -> str:
    """`sym;asym` is cy, `dc;sym` is sym-dc; what is not understood is generic."""
    words = [word.strip() for word in services.split(";")]
    if len(set(words)) != len(words) or not set(words) <= set(_ORDER):
        return GENERIC
    if set(words) == {"sym", "asym"}:
        return "cy"
    return "-".join(sorted(words, key=_ORDER.index))


def _services_enabled(config: str) -> str:
    parser = configparser.RawConfigParser(strict=False, allow_no_value=True, inline_comment_prefixes=None)
    try:
        parser.read_string(config)
        return parser.get("GENERAL", "ServicesEnabled", fallback="") or ""
    except configparser.Error:
        return ""
