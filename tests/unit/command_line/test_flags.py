"""Command lines as Go's flag package reads them."""

import pytest

from qat_server.command_line.flags import SERVER_FLAGS, Flag, FlagError, from_environment, plain, read
from qat_server.command_line.settings import SettingsError, parse

SPELLINGS = {
    "one dash, space": ["-dpdk-driver", "igb_uio"],
    "one dash, equals": ["-dpdk-driver=igb_uio"],
    "two dashes, space": ["--dpdk-driver", "igb_uio"],
    "two dashes, equals": ["--dpdk-driver=igb_uio"],
    "underscore for dash": ["--dpdk_driver=igb_uio"],
    "the last wins": ["-dpdk-driver", "vfio-pci", "--dpdk-driver=igb_uio"],
    "closed by --": ["-dpdk-driver", "igb_uio", "--"],
}


@pytest.mark.parametrize("arguments", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_all_spellings_mean_the_same(arguments: list[str]) -> None:
    line = read(arguments, SERVER_FLAGS)

    assert line.values == {"dpdk-driver": "igb_uio"}
    assert line.rest == ()


@pytest.mark.parametrize("flag", SERVER_FLAGS, ids=lambda flag: flag.name)
def test_every_flag_takes_both_dashes_and_both_ways_to_give_a_value(flag: Flag) -> None:
    for dashes in ("-", "--"):
        assert read([f"{dashes}{flag.name}=x"], SERVER_FLAGS).values == {flag.name: "x"}
        if flag.boolean:
            assert read([f"{dashes}{flag.name}", "x"], SERVER_FLAGS).values == {flag.name: "true"}
        else:
            assert read([f"{dashes}{flag.name}", "x"], SERVER_FLAGS).values == {flag.name: "x"}


LINES: dict[str, tuple[list[str], dict[str, str], tuple[str, ...]]] = {
    "nothing": ([], {}, ()),
    "boolean alone": (["-logtostderr"], {"logtostderr": "true"}, ()),
    "boolean with a value": (["--logtostderr=0"], {"logtostderr": "0"}, ()),
    "a boolean takes no value after a space": (["-logtostderr", "false"], {"logtostderr": "true"}, ("false",)),
    "a value may begin with a dash": (["-v", "-1"], {"v": "-1"}, ()),
    "a value may look like a flag": (["-log_dir", "--v"], {"log_dir": "--v"}, ()),
    "negative after equals": (["-v=-1"], {"v": "-1"}, ()),
    "empty value": (["--metrics-address="], {"metrics-address": ""}, ()),
    "empty argument as a value": (["--metrics-address", ""], {"metrics-address": ""}, ()),
    "a value with equals": (["-vmodule", "discovery=4,sim*=2"], {"vmodule": "discovery=4,sim*=2"}, ()),
    "both equals": (["-vmodule=discovery=4"], {"vmodule": "discovery=4"}, ()),
    "a command ends the flags": (["-v", "3", "demo", "-v", "4"], {"v": "3"}, ("demo", "-v", "4")),
    "a dash alone is no flag": (["-", "-v=1"], {}, ("-", "-v=1")),
    "-- ends the flags": (["-v=1", "--", "-v=2"], {"v": "1"}, ("-v=2",)),
    "several": (
        ["-v", "5", "--alsologtostderr", "-mode=dpdk"],
        {"v": "5", "alsologtostderr": "true", "mode": "dpdk"},
        (),
    ),
}


@pytest.mark.parametrize(("arguments", "values", "rest"), LINES.values(), ids=LINES.keys())
def test_lines(arguments: list[str], values: dict[str, str], rest: tuple[str, ...]) -> None:
    line = read(arguments, SERVER_FLAGS)

    assert (line.values, line.rest) == (values, rest)


ERRORS = {
    "near": (["-dpdk-drivr", "x"], "unknown flag -dpdk-drivr: did you mean -dpdk-driver?"),
    "near, two dashes and a value": (
        ["--max-devices=4"],
        "unknown flag --max-devices: did you mean --max-num-devices?",
    ),
    "a value that sticks to its flag": (["-v4"], "unknown flag -v4: did you mean -v?"),
    "far": (["--zzz"], "unknown flag --zzz: --help lists all flags"),
    "no value, two dashes": (["--dpdk-driver"], "flag --dpdk-driver needs a value (DRIVER)"),
    "no value": (["-dpdk-driver"], "flag -dpdk-driver needs a value (DRIVER)"),
    "three dashes": (["---v"], "bad flag syntax: '---v'"),
    "no name": (["-=3"], "bad flag syntax: '-=3'"),
}


@pytest.mark.parametrize(("arguments", "sentence"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(arguments: list[str], sentence: str) -> None:
    with pytest.raises(FlagError) as caught:
        read(arguments, SERVER_FLAGS)

    assert str(caught.value) == sentence


DEMO = (Flag("keep", "false", "", ""), Flag("node", "", "FILE", ""))
PLAIN = {
    "spaces become equals": (["-node", "a b"], ["--node=a b"]),
    "a true boolean stays": (["-keep"], ["--keep"]),
    "a false boolean is dropped": (["-keep", "-keep=false"], []),
    "the rest is unchanged": (["-keep", "more", "-x"], ["--keep", "more", "-x"]),
}


@pytest.mark.parametrize(("arguments", "expected"), PLAIN.values(), ids=PLAIN.keys())
def test_plain(arguments: list[str], expected: list[str]) -> None:
    assert plain(arguments, DEMO) == expected


def test_a_switch_that_is_neither_true_nor_false() -> None:
    with pytest.raises(FlagError, match="--keep: 'maybe' is not true or false"):
        plain(["-keep=maybe"], DEMO)


def test_environment() -> None:
    environment = {"QAT_PLUGIN_DPDK_DRIVER": "igb_uio", "QAT_PLUGIN_LOG_DIR": "/x", "QAT_PLUGIN_V": "", "HOME": "/"}

    assert from_environment(environment) == {"dpdk-driver": "igb_uio", "log_dir": "/x"}


def test_an_empty_variable_does_not_switch_a_boolean_off() -> None:
    environment = from_environment({"QAT_PLUGIN_REQUIRE_SANDBOX": ""})

    with pytest.raises(SettingsError, match="QAT_PLUGIN_REQUIRE_SANDBOX: '' is not true or false"):
        parse(environment=environment)


def test_every_variable_is_its_own() -> None:
    variables = [flag.variable for flag in SERVER_FLAGS]

    assert len(set(variables)) == len(variables)


def test_the_nodes_name_is_in_its_usual_variable_too() -> None:
    assert from_environment({"NODE_NAME": "n1"}) == {"node-name": "n1"}
    assert from_environment({"NODE_NAME": "n1", "QAT_PLUGIN_NODE_NAME": "n2"}) == {"node-name": "n2"}


UNKNOWN = {
    "QAT_PLUGIN_MAX_DEVICES": "did you mean QAT_PLUGIN_MAX_NUM_DEVICES?",
    "QAT_PLUGIN_REQUIRE_SANDBOXES": "did you mean QAT_PLUGIN_REQUIRE_SANDBOX?",
    "QAT_PLUGIN_SERVICE_HOST": "a Service of this name sets it; set enableServiceLinks: false in the pod",
    "QAT_PLUGIN_PORT_9090_TCP_PROTO": "a Service of this name sets it; set enableServiceLinks: false in the pod",
}


@pytest.mark.parametrize(("name", "said"), UNKNOWN.items(), ids=UNKNOWN)
def test_an_unknown_variable_is_refused(name: str, said: str) -> None:
    """A misspelt one would have no effect, and nobody would notice."""
    with pytest.raises(FlagError) as caught:
        from_environment({name: "1", "QAT_HELPER_POLICY": "/x"})
    assert str(caught.value) == f"unknown variable {name}: {said}"
