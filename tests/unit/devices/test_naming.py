"""Resource names: tables of services as the kernel's drivers show them, and of dev_cfg texts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat_server.devices.inventory import PhysicalFunction, VirtualFunction
from qat_server.devices.naming import name_of_services, needs_config, resource_name
from qat_shared.resources import RESOURCES
from support.sysfs_tree import address

PF, VF = address("6b:00.0"), address("6b:00.1")


def physical(state: str | None = "up", services: str | None = "dc", device_id: int = 0x4940) -> PhysicalFunction:
    return PhysicalFunction(PF, device_id, "4xxx", 0, state, services, 16, (VF,))


def virtual(device_id: int = 0x4941) -> VirtualFunction:
    return VirtualFunction(VF, device_id, None, PF, 0, 1, noiommu=False, uio=None, in_use=None)


SERVICES = {
    "sym": "sym",
    "asym": "asym",
    "dc": "dc",
    "dcc": "dcc",
    "decomp": "decomp",
    "sym;asym": "cy",
    "asym;sym": "cy",
    "sym;dc": "sym-dc",
    "dc;sym": "sym-dc",
    "asym;dc": "asym-dc",
    "dc;asym": "asym-dc",
    "sym;asym;dc": "asym-sym-dc",
    "dc;asym;sym": "asym-sym-dc",
    "decomp;asym;dc": "asym-dc-decomp",
    " sym ; asym ": "cy",
    "": "generic",
    ";": "generic",
    "sym;": "generic",
    "sym;sym": "generic",
    "sym;magic": "generic",
    "SYM": "generic",
    "sym,asym": "generic",
    "cy": "generic",
}


@pytest.mark.parametrize(("services", "name"), SERVICES.items(), ids=[repr(services) for services in SERVICES])
def test_services(services: str, name: str) -> None:
    assert resource_name(virtual(), physical(services=services), None) == name
    config = f"[GENERAL]\nServicesEnabled = {services}\n"
    assert resource_name(virtual(), physical(state=None, services=None), config) == name, "in dev_cfg"


@given(st.lists(st.sampled_from(["asym", "sym", "dc", "decomp", "dcc", "magic"])))
def test_every_name_can_be_registered(services: list[str]) -> None:
    assert f"qat.intel.com/{name_of_services(';'.join(services))}" in RESOURCES
    assert len(RESOURCES) == 32


DEV_CFG = """\
[GENERAL]
NumberOfInstances = 2
ServicesEnabled = sym;asym
ConfigVersion = 2
[KERNEL]
ServicesEnabled = dc
"""

CONFIGS: dict[str, tuple[str | None, str]] = {
    "not known": (None, "generic"),
    "empty": ("", "generic"),
    "the kernel's": (DEV_CFG, "cy"),
    "no spaces": ("[GENERAL]\nServicesEnabled=dc\n", "dc"),
    "inline comment": ("[GENERAL]\nServicesEnabled = sym;dc # compression too\n", "sym-dc"),
    "comment lines": ("# a\n; b\n[GENERAL]\n# c\nServicesEnabled = dc\n", "dc"),
    "key without value": ("[GENERAL]\nServicesEnabled\n", "generic"),
    "empty value": ("[GENERAL]\nServicesEnabled =\n", "generic"),
    "other section only": ("[KERNEL]\nServicesEnabled = dc\n", "generic"),
    "section twice": ("[GENERAL]\na = 1\n[KERNEL]\n[GENERAL]\nServicesEnabled = dc\n", "dc"),
    "indented": ("[GENERAL]\n  a = 1\n    ServicesEnabled = dc\n", "dc"),
    "no section": ("ServicesEnabled = dc\n", "generic"),
    "key of another case": ("[GENERAL]\nservicesenabled = dc\n", "generic"),
    "percent signs": ("[GENERAL]\nx = %(y)s\nServicesEnabled = dc\n", "dc"),
    "no INI file at all": ("\x00\xff][= ;\n[[[", "generic"),
}


@pytest.mark.parametrize(("config", "name"), CONFIGS.values(), ids=CONFIGS)
def test_config(config: str | None, name: str) -> None:
    assert resource_name(virtual(), physical(state=None, services=None), config) == name


WHOSE: dict[str, tuple[PhysicalFunction | None, VirtualFunction, str]] = {
    "up: sysfs wins over dev_cfg": (physical(services="dc"), virtual(), "dc"),
    "down: dev_cfg": (physical(state="down", services="dc"), virtual(), "cy"),
    "no qat attributes: dev_cfg": (physical(state=None, services=None), virtual(), "cy"),
    "up without cfg_services: dev_cfg": (physical(services=None), virtual(), "cy"),
    "inside a VM": (None, virtual(), "generic"),
    "420xx": (physical(), virtual(0x4947), "dc"),
    "6xxx": (physical(), virtual(0x4949), "dc"),
    "c6xx is never named": (physical(), virtual(0x37C9), "generic"),
    "dh895xcc is never named": (physical(), virtual(0x0443), "generic"),
    "outside the table": (physical(), virtual(0x1572), "generic"),
}


@pytest.mark.parametrize(("pf", "vf", "name"), WHOSE.values(), ids=WHOSE)
def test_where_the_services_come_from(pf: PhysicalFunction | None, vf: VirtualFunction, name: str) -> None:
    assert resource_name(vf, pf, DEV_CFG) == name


NEEDS: dict[str, tuple[PhysicalFunction, bool]] = {
    "up": (physical(), False),
    "up with services that are unknown": (physical(services="magic"), False),
    "down": (physical(state="down"), True),
    "no qat attributes": (physical(state=None, services=None), True),
    "never named": (physical(state=None, services=None, device_id=0x37C8), False),
    "no VFs to be named": (PhysicalFunction(PF, 0x4940, "4xxx", 0, "down", "dc", 16, ()), False),
}


@pytest.mark.parametrize(("pf", "needed"), NEEDS.values(), ids=NEEDS)
def test_needs_config(pf: PhysicalFunction, needed: bool) -> None:
    assert needs_config(pf) is needed


@given(st.text() | st.text("[]GENERALServicesEnabled=;:#%\n\t dcsym").map("[GENERAL]\n{}".format))
def test_any_config_gives_a_name(config: str) -> None:
    name = resource_name(virtual(), physical(state=None, services=None), config)
    assert name == "cy" or set(name.split("-")) <= {"generic", "asym", "sym", "dc", "decomp", "dcc"}
