"""PCI addresses: sysfs' format is parsed and printed unchanged; anything else is refused."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat_shared.pci import PciAddress

addresses = st.builds(
    PciAddress, st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFF), st.integers(0, 0x1F), st.integers(0, 7)
)


@given(addresses)
def test_parsing_and_printing_are_inverse(address: PciAddress) -> None:
    assert PciAddress.parse(str(address)) == address


@given(addresses)
def test_an_address_survives_a_message(address: PciAddress) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(address), type=PciAddress) == address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0000:6b:00.1", PciAddress(0, 0x6B, 0, 1)),
        ("ffff:ff:1f.7", PciAddress(0xFFFF, 0xFF, 0x1F, 7)),
        ("10000:e1:02.0", PciAddress(0x10000, 0xE1, 2, 0)),
    ],
)
def test_addresses_as_the_kernel_writes_them(text: str, expected: PciAddress) -> None:
    assert PciAddress.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "6b:00.1",
        "0000:6b:00",
        "0000:6b:00.8",
        "0000:6b:20.0",
        "0000:6B:00.1",
        "00000:6b:00.1",
        "123456789:6b:00.1",
        " 0000:6b:00.1",
        "0000:6b:00.1\n",
        "0000:6b:00.1/..",
        "\u0660\u0660\u0660\u0660:6b:00.1",
        "0000:6b:00.1" * 100,
    ],
)
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="PCI address"):
        PciAddress.parse(text)


@given(st.text())
def test_no_text_gives_another_exception(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert str(PciAddress.parse(text)) == text


def test_the_order_is_domain_bus_device_function() -> None:
    texts = ["0000:03:00.1", "0000:03:01.0", "0000:0a:00.0", "0001:00:00.0", "10000:00:00.0"]
    assert [str(address) for address in sorted(map(PciAddress.parse, reversed(texts)))] == texts
