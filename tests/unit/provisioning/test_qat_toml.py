"""qat.toml: the settings of each text, and one sentence with file, line and key path for each invalid one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat_server.provisioning.qat_conf import ConfigurationError
from qat_server.provisioning.qat_toml import ALL, PfSettings, QatToml, Rule, parse
from support.sysfs_tree import address

DC = PfSettings(services=("dc",))


def _with_rule(
    settings: PfSettings, at: str | None = None, device_id: int | None = None, numa: int | None = None
) -> QatToml:
    return QatToml(rules=(Rule("rules[0]", None if at is None else address(at), device_id, numa, settings),))


GOOD: dict[str, tuple[str, QatToml]] = {
    "empty": ("", QatToml()),
    "empty defaults": ("[defaults]\n", QatToml()),
    "heartbeat as text": ('heartbeat_interval = "1m30s"', QatToml(heartbeat_interval=90.0)),
    "heartbeat as number": ("heartbeat_interval = 5", QatToml(heartbeat_interval=5.0)),
    "heartbeat as fraction": ("heartbeat_interval = 0.5", QatToml(heartbeat_interval=0.5)),
    "heartbeat off": ("heartbeat_interval = 0", QatToml(heartbeat_interval=0.0)),
    "all defaults": (
        '[defaults]\nservices = "sym ; asym"\nauto_reset = true\nvfs = "all"\npm_idle_enabled = false',
        QatToml(defaults=PfSettings(("asym", "sym"), True, ALL, False)),
    ),
    "services as list": ('[defaults]\nservices = ["sym", "dc"]', QatToml(defaults=PfSettings(("sym", "dc")))),
    "no VFs": ("[defaults]\nvfs = 0", QatToml(defaults=PfSettings(vfs=0))),
    "rule by address": ('[[rules]]\naddress = "0000:6b:00.0"\nservices = "dc"', _with_rule(DC, at="6b:00.0")),
    "rule by address in capitals": (
        '[[rules]]\naddress = "10000:6B:00.0"\nservices = "dc"',
        _with_rule(DC, at="10000:6b:00.0"),
    ),
    "rule by device id": ('[[rules]]\ndevice_id = "4940"\nservices = "dc"', _with_rule(DC, device_id=0x4940)),
    "rule by device id with 0x": ('[[rules]]\ndevice_id = "0x4940"\nservices = "dc"', _with_rule(DC, device_id=0x4940)),
    "rule by device id as number": ('[[rules]]\ndevice_id = 0x37c8\nservices = "dc"', _with_rule(DC, device_id=0x37C8)),
    "rule by NUMA node": ('[[rules]]\nnuma_node = 1\nservices = "dc"', _with_rule(DC, numa=1)),
    "rule by all three": (
        '[[rules]]\naddress = "0000:6b:00.0"\ndevice_id = "4948"\nnuma_node = 1\nservices = "dc"',
        _with_rule(DC, "6b:00.0", 0x4948, 1),
    ),
}


@pytest.mark.parametrize(("text", "expected"), GOOD.values(), ids=GOOD.keys())
def test_good(text: str, expected: QatToml) -> None:
    assert parse(text) == expected


SETTINGS = "services, auto_reset, vfs, pm_idle_enabled"
BAD: dict[str, tuple[str, str]] = {
    "not TOML": ("[defaults]\nvfs = \n", "qat.toml line 2: Invalid value"),
    "key twice at the end": ('[defaults]\nvfs = 0\nvfs = "all"', "qat.toml line 3: Cannot overwrite a value"),
    "unknown key": ("x = 1", "qat.toml line 1: x: unknown key; known are heartbeat_interval, defaults, rules"),
    "unknown default": ("[defaults]\nvf = 1", f"qat.toml line 2: defaults.vf: unknown key; known are {SETTINGS}"),
    "unknown key of a rule": (
        '[[rules]]\nnuma_node = 0\nvfs = 0\n[[rules]]\nnuma_node = 1\n\nservice = "dc"',
        f"qat.toml line 7: rules[1].service: unknown key; known are {SETTINGS}, address, device_id, numa_node",
    ),
    "rules as one table": ("[rules]\nvfs = 0", "qat.toml line 1: rules: expected `array`, got `table`"),
    "auto-reset as string": (
        '[defaults]\nauto_reset = "on"',
        "qat.toml line 2: defaults.auto_reset: expected `bool | null`, got `str`",
    ),
    "number of VFs negative": ("[defaults]\nvfs = -1", "qat.toml line 2: defaults.vfs: expected `int` >= 0"),
    "number of VFs as boolean": (
        "[defaults]\nvfs = true",
        "qat.toml line 2: defaults.vfs: expected `int | str | null`, got `bool`",
    ),
    "VFs as string": (
        '[defaults]\nvfs = "some"',
        "qat.toml line 2: defaults.vfs: 'some' is neither a number nor \"all\"",
    ),
    "unknown service, value over several lines": (
        '[defaults]\nauto_reset = true\nservices = [\n  "sym",\n  "foo",\n]\n',
        "qat.toml line 3: defaults.services: unknown service 'foo'; known are asym, sym, dc, decomp, dcc",
    ),
    "no service": (
        "[defaults]\nservices = []",
        "qat.toml line 2: defaults.services: no service is given; known are asym, sym, dc, decomp, dcc",
    ),
    "rule without a selector": (
        "[[rules]]\nvfs = 0",
        "qat.toml line 1: rules[0]: selects no PF; add address, device_id or numa_node, or use [defaults] for all PFs",
    ),
    "rule without setting": (
        "[[rules]]\nnuma_node = 0",
        "qat.toml line 1: rules[0]: has no setting; add services, auto_reset, vfs or pm_idle_enabled",
    ),
    "two rules for the same PFs": (
        '[[rules]]\ndevice_id = "4940"\nvfs = 0\n\n[[rules]]\ndevice_id = 0x4940\nauto_reset = true',
        "qat.toml line 5: rules[1]: selects the same PFs as rules[0]; merge the two rules",
    ),
    "address without domain": (
        '[[rules]]\naddress = "6b:00.0"\nvfs = 0',
        "qat.toml line 2: rules[0].address: '6b:00.0' is not a PCI address in lower case, such as 0000:6b:00.1",
    ),
    "device id in decimal": (
        "[[rules]]\ndevice_id = 4940\nvfs = 0",
        "qat.toml line 2: rules[0].device_id: 4940 (0x134c) is not a PF that can be provisioned;"
        " known are 37c8, 4940, 4942, 4944, 4946, 4948",
    ),
    "device id of a VF": (
        '[[rules]]\ndevice_id = "4941"\nvfs = 0',
        "qat.toml line 2: rules[0].device_id: '4941' is not a PF that can be provisioned;"
        " known are 37c8, 4940, 4942, 4944, 4946, 4948",
    ),
    "negative NUMA node": (
        "[[rules]]\nnuma_node = -1\nvfs = 0",
        "qat.toml line 2: rules[0].numa_node: expected `int` >= 0",
    ),
    "heartbeat that is not a duration": (
        'heartbeat_interval = "5 s"',
        "qat.toml line 1: heartbeat_interval: '5 s' is not a duration such as 5s, 500ms or 1m30s",
    ),
    "infinite heartbeat": (
        "heartbeat_interval = inf",
        "qat.toml line 1: heartbeat_interval: 'inf' is not a duration such as 5s, 500ms or 1m30s",
    ),
    "date instead of a string": (
        "[defaults]\nservices = 2024-01-01",
        "qat.toml line 2: defaults.services: expected `str | array | null`, got `date`",
    ),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD.keys())
def test_bad(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        parse(text)
    assert str(raised.value) == message


def test_deep_nesting_and_long_numbers_are_errors() -> None:
    for text in ("x = " + "[" * 3000, "x = " + "9" * 5000):
        with pytest.raises(ConfigurationError, match="cannot be parsed as TOML"):
            parse(text)


def test_rules_have_the_most_specific_first() -> None:
    text = "".join(
        f"[[rules]]\n{selector}\nvfs = 0\n"
        for selector in (
            "numa_node = 0",
            'device_id = "4940"',
            'device_id = "4940"\nnuma_node = 0',
            'address = "0000:6b:00.0"',
        )
    )
    assert [rule.name for rule in parse(text).rules] == ["rules[3]", "rules[2]", "rules[1]", "rules[0]"]


_values = st.one_of(
    st.sampled_from(
        ['"sym;asym"', '["dc"]', "true", "0", '"all"', '"4940"', '"0000:6b:00.0"', "[[1]]", "{a = 1}", "nan"]
    ),
    st.text(max_size=10),
)
_lines = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["[[rules]]", "[defaults]", "[rules]", "[[defaults]]", "[defaults.services]"]),
    st.builds(
        "{} = {}".format,
        st.sampled_from(
            [
                "services",
                "vfs",
                "auto_reset",
                "pm_idle_enabled",
                "address",
                "device_id",
                "numa_node",
                "x",
                '"a`b"',
                "a.b",
            ]
        ),
        _values,
    ),
)


@given(st.lists(_lines, max_size=8))
def test_any_text_is_parsed_or_gives_an_error(lines: list[str]) -> None:
    try:
        parse("\n".join(lines))
    except ConfigurationError as error:
        assert error.file == "qat.toml"
