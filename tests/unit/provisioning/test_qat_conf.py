"""qat.conf: the settings of each text, and one sentence with file, line and key for each invalid one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat_server.provisioning.qat_conf import ConfigurationError, QatConf, canonical, parse

GOOD: dict[str, tuple[str, QatConf]] = {
    "empty": ("", QatConf()),
    "comments and blank lines only": ("# nothing\n\n   \n\t# here\n", QatConf()),
    "one service": ("ServicesEnabled=dc\n", QatConf(("dc",), None, 1)),
    "two services": ("ServicesEnabled=sym;asym", QatConf(("asym", "sym"), None, 1)),
    "two services in the other order": ("ServicesEnabled=asym;sym", QatConf(("asym", "sym"), None, 1)),
    "three services": ("ServicesEnabled=sym;dc;asym", QatConf(("asym", "sym", "dc"), None, 1)),
    "compression chaining": ("ServicesEnabled=dcc", QatConf(("dcc",), None, 1)),
    "decompression": ("ServicesEnabled=decomp;sym", QatConf(("sym", "decomp"), None, 1)),
    "spaces": ("  ServicesEnabled \t=  sym ;  dc  \n", QatConf(("sym", "dc"), None, 1)),
    "comment after the value": ("ServicesEnabled=sym;dc#;asym", QatConf(("sym", "dc"), None, 1)),
    "auto-reset on": ("AutoresetEnabled=on", QatConf(None, True, None)),
    "auto-reset off": ("AutoresetEnabled = off # as shipped", QatConf(None, False, None)),
    "both, with DOS line ends": ("# x\r\nAutoresetEnabled=on\r\nServicesEnabled=dc\r\n", QatConf(("dc",), True, 3)),
    "byte order mark": ("\ufeffServicesEnabled=dc", QatConf(("dc",), None, 1)),
}


@pytest.mark.parametrize(("text", "expected"), GOOD.values(), ids=GOOD.keys())
def test_good(text: str, expected: QatConf) -> None:
    assert parse(text) == expected


KNOWN = "known are asym, sym, dc, decomp, dcc"
BAD: dict[str, tuple[str, str]] = {
    "unknown service": (
        "\nServicesEnabled=sym;cy",
        f"qat.conf line 2: ServicesEnabled: unknown service 'cy'; {KNOWN}",
    ),
    "capitals": ("ServicesEnabled=Sym", f"qat.conf line 1: ServicesEnabled: unknown service 'Sym'; {KNOWN}"),
    "comma": ("ServicesEnabled=sym,asym", f"qat.conf line 1: ServicesEnabled: unknown service 'sym,asym'; {KNOWN}"),
    "no service": ("ServicesEnabled=", f"qat.conf line 1: ServicesEnabled: no service is given; {KNOWN}"),
    "semicolons only": ("ServicesEnabled=;", f"qat.conf line 1: ServicesEnabled: no service is given; {KNOWN}"),
    "semicolon at the end": (
        "ServicesEnabled=sym;",
        "qat.conf line 1: ServicesEnabled: a service is missing before or after `;`",
    ),
    "service twice": ("ServicesEnabled=dc; dc", "qat.conf line 1: ServicesEnabled: dc is given twice"),
    "auto-reset yes": ("AutoresetEnabled=yes", "qat.conf line 1: AutoresetEnabled: 'yes' is neither on nor off"),
    "auto-reset without value": ("AutoresetEnabled=", "qat.conf line 1: AutoresetEnabled: '' is neither on nor off"),
    "unknown key": (
        "# x\nservicesenabled=dc",
        "qat.conf line 2: unknown key 'servicesenabled'; known are ServicesEnabled, AutoresetEnabled",
    ),
    "no key": ("=dc", "qat.conf line 1: unknown key ''; known are ServicesEnabled, AutoresetEnabled"),
    "no equals sign": ("ServicesEnabled dc", "qat.conf line 1: 'ServicesEnabled dc' is not of the form Key=value"),
    "key twice": (
        "ServicesEnabled=dc\nAutoresetEnabled=on\nServicesEnabled=dc",
        "qat.conf line 3: ServicesEnabled: is already set on line 1; remove one of the two",
    ),
    "two values": ("ServicesEnabled=dc=sym", f"qat.conf line 1: ServicesEnabled: unknown service 'dc=sym'; {KNOWN}"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD.keys())
def test_bad(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        parse(text)
    assert str(raised.value) == message


def test_error_has_file_line_and_key() -> None:
    with pytest.raises(ConfigurationError) as raised:
        parse("ServicesEnabled=x", "qat-node1.conf")
    error = raised.value
    assert (error.file, error.line, error.key) == ("qat-node1.conf", 1, "ServicesEnabled")


def test_canonical_services_of_a_device() -> None:
    assert canonical("sym;asym\n") == ("asym", "sym")
    assert canonical("") is None
    assert canonical(None) is None
    assert canonical("sym;future") is None


_lines = st.one_of(
    st.text(max_size=40),
    st.builds(
        "{}{}{}".format,
        st.sampled_from(["ServicesEnabled", "AutoresetEnabled", "# ServicesEnabled", ""]),
        st.sampled_from(["=", " = ", ""]),
        st.one_of(st.sampled_from(["on", "off", "sym;asym", "dc ", "dc;dc", ";"]), st.text(max_size=10)),
    ),
)


@given(st.lists(_lines, max_size=5))
def test_any_text_is_parsed_or_gives_one_sentence(lines: list[str]) -> None:
    try:
        parse("\n".join(lines))
    except ConfigurationError as error:
        assert "\n" not in str(error)
        assert error.line is not None and 1 <= error.line <= len("\n".join(lines).split("\n"))


@given(st.permutations(["sym", "asym", "dc"]), st.sampled_from([";", " ; ", "; "]))
def test_order_has_no_effect(words: list[str], between: str) -> None:
    assert parse(f"ServicesEnabled={between.join(words)}").services == ("asym", "sym", "dc")
