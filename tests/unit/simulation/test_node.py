"""Node descriptions: valid and invalid ones, the addresses of VFs, and the services of each generation."""

import re
from typing import NamedTuple

import msgspec
import pytest

from qat_simulation.node.description import Node, NodeError, Pf, demo_node, parse_node
from qat_simulation.node.services import parse_services, services_allowed


class Bad(NamedTuple):
    name: str
    text: str
    sentence: str


BAD = [
    Bad("no JSON", "{", "the node description is not usable: it is not JSON: Input data was truncated"),
    Bad(
        "no such state",
        '{"pfs": [{"address": "0000:6b:00.0", "state": "sideways"}]}',
        "Invalid enum value 'sideways' - at `$.pfs[0].state`: it is up or down",
    ),
    Bad("no such heartbeat", '{"pfs": [{"address": "0000:6b:00.0", "heartbeat": 1}]}', "heartbeat`: it is 0 or -1"),
    Bad("not UTF-8", '{"pfs": "\udcff"}', "the node description is not usable"),
    Bad("unknown key", '{"pf": []}', "unknown field `pf`"),
    Bad(
        "unknown key of a PF", '{"pfs": [{"address": "0000:6b:00.0", "vfs": 3}]}', "unknown field `vfs` - at `$.pfs[0]`"
    ),
    Bad("PF without address", '{"pfs": [{}]}', "missing required field `address`"),
    Bad("no address", '{"pfs": [{"address": "6b:00.0"}]}', "PF 6b:00.0: address: '6b:00.0' is not a PCI address"),
    Bad("device is no id", '{"pfs": [{"address": "0000:6b:00.0", "device": "49"}]}', "$.pfs[0].device"),
    Bad("no PF", '{"pfs": [{"address": "0000:6b:00.0", "device": "4941"}]}', "4941 is not the id of a QAT PF"),
    Bad("no VF", '{"vfs": [{"address": "0000:00:05.0", "device": "4940"}]}', "4940 is not the id of a QAT VF"),
    Bad(
        "ours among the others",
        '{"others": [{"address": "0000:00:05.0", "vendor": "8086", "device": "4941"}]}',
        "it belongs under pfs or vfs",
    ),
    Bad(
        "too many VFs enabled",
        '{"pfs": [{"address": "0000:6b:00.0", "num_vfs": 17}]}',
        "PF 0000:6b:00.0: num_vfs: 17 is more than total_vfs, 16",
    ),
    Bad(
        "VFs while down",
        '{"pfs": [{"address": "0000:6b:00.0", "state": "down", "num_vfs": 16}]}',
        "num_vfs: a device that is down",
    ),
    Bad(
        "down without qat/",
        '{"pfs": [{"address": "0000:6b:00.0", "device": "37c8", "state": "down"}]}',
        "state: only devices",
    ),
    Bad(
        "unknown service",
        '{"pfs": [{"address": "0000:6b:00.0", "services": "rsa"}]}',
        "services: 4940 does not accept 'rsa'",
    ),
    Bad(
        "too many services", '{"pfs": [{"address": "0000:6b:00.0", "services": "sym;asym;dc"}]}', "4940 does not accept"
    ),
    Bad("two on one address", '{"pfs": [{"address": "0000:6b:00.0"}, {"address": "0000:6b:00.0"}]}', "is taken by PF"),
    Bad(
        "a PF where a VF is",
        '{"pfs": [{"address": "0000:6b:00.0"}, {"address": "0000:6b:01.0"}]}',
        "is taken by VF 7 of PF",
    ),
    Bad("beyond the last bus", '{"pfs": [{"address": "0000:ff:1f.0"}]}', "total_vfs: VF 7 would be beyond bus ff"),
    Bad(
        "vfio-pci without IOMMU",
        '{"iommu": false, "pfs": [{"address": "0000:6b:00.0", "vf_driver": "vfio-pci"}]}',
        "vf_driver: vfio-pci rejects all devices on a node without IOMMU",
    ),
    Bad(
        "unknown driver of VFs",
        '{"pfs": [{"address": "0000:6b:00.0", "vf_driver": "foo"}]}',
        "PF 0000:6b:00.0: vf_driver: 'foo' is none of 4xxxvf, vfio-pci, igb_uio; list other drivers in drivers",
    ),
    Bad(
        "unknown driver of a VF alone",
        '{"vfs": [{"address": "0000:00:05.0", "driver": "foo"}]}',
        "VF 0000:00:05.0: driver: 'foo' is none of",
    ),
    Bad(
        "denied by vfio-pci",
        '{"disable_denylist": false, "pfs": [{"address": "0000:6b:00.0", "device": "37c8", "vf_driver": "vfio-pci"}]}',
        "vf_driver: vfio-pci rejects c6xxvf's devices; set disable_denylist",
    ),
    Bad("driver is a path", '{"pfs": [{"address": "0000:6b:00.0", "vf_driver": "../x"}]}', "$.pfs[0].vf_driver"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_invalid_description_is_rejected_with_one_sentence(case: Bad) -> None:
    with pytest.raises(NodeError, match=re.escape(case.sentence)) as caught:
        parse_node(case.text.encode("utf-8", "surrogateescape"))
    assert "\n" not in str(caught.value)


def test_demo_node_is_the_same_after_json() -> None:
    assert parse_node(msgspec.json.encode(demo_node())) == demo_node()


@pytest.mark.parametrize(
    ("device", "addresses"),
    [
        ("4940", ["0000:6b:00.1", "0000:6b:00.2", "0000:6b:00.7", "0000:6b:01.0", "0000:6b:02.0"]),
        ("37c8", ["0000:6b:01.0", "0000:6b:01.1", "0000:6b:01.6", "0000:6b:01.7", "0000:6b:02.7"]),
    ],
)
def test_vf_addresses_are_those_of_the_hardware(device: str, addresses: list[str]) -> None:
    pf = Pf(address="0000:6b:00.0", device=device)
    assert [str(pf.vf_address(number)) for number in (0, 1, 6, 7, 15)] == addresses


def test_vf_addresses_continue_on_the_next_bus() -> None:
    pf = Pf(address="0000:6b:1f.7", vf_offset=2, vf_stride=4)
    assert [str(pf.vf_address(number)) for number in (0, 1, 2)] == ["0000:6c:00.1", "0000:6c:00.5", "0000:6c:01.1"]


@pytest.mark.parametrize(
    ("pf", "enabled"),
    [
        (Pf(address="0000:6b:00.0"), 16),
        (Pf(address="0000:6b:00.0", num_vfs=0), 0),
        (Pf(address="0000:6b:00.0", state="down"), 0),
        (Pf(address="0000:6b:00.0", driver=""), 0),
        (Pf(address="0000:6b:00.0", total_vfs=4), 4),
    ],
)
def test_vfs_enabled_by_default(pf: Pf, enabled: int) -> None:
    assert pf.enabled_vfs == enabled


def test_drivers_loaded_are_those_needed() -> None:
    assert demo_node().loaded_kernel_drivers == ("4xxx", "4xxxvf", "c6xx", "c6xxvf")
    assert Node(kernel_drivers=()).loaded_kernel_drivers == ()


GEN4, GEN6 = 0x4940, 0x4948


@pytest.mark.parametrize(
    ("device", "services", "allowed"),
    [
        (GEN4, "sym;asym", True),
        (GEN4, "asym;sym", True),
        (GEN4, "dcc", True),
        (GEN4, "sym;dcc", False),
        (GEN4, "sym;asym;dc", False),
        (GEN4, "decomp", False),
        (GEN4, "sym;sym", False),
        (GEN4, "", False),
        (GEN4, "sym;", False),
        (GEN6, "sym;asym;dc", True),
        (GEN6, "decomp", True),
        (GEN6, "sym;asym;dc;decomp", False),
        (GEN6, "dc;dcc", False),
    ],
)
def test_services_of_a_generation(device: int, services: str, allowed: bool) -> None:
    assert services_allowed(device, services) is allowed


def test_services_have_the_kernel_s_order() -> None:
    assert parse_services("dc;sym;asym") == ("asym", "sym", "dc")
