"""The helper's options and their environment variables: what each accepts, and the one sentence about anything else."""

import pytest

from qat_helper.main import main
from qat_helper.options import OPTIONS, VARIABLES, OptionError, parse

MISSING = "the value is missing"
NOT_A_NUMBER = "'x' is not a whole number"
WRONG = {
    "sysfs-root": {"": MISSING},
    "kubelet-dir": {"": MISSING},
    "socket": {"": MISSING},
    "server-uid": {
        "x": NOT_A_NUMBER,
        "": MISSING,
        "-1": "-1 is too small, the minimum is 0",
        "65534": "65534 stands for every id that has no name of its own: use another",
        "4294967295": "4294967295 is too large, the maximum is 4294967294",
    },
    "server-gid": {
        "x": NOT_A_NUMBER,
        "-1": "-1 is too small, the minimum is 0",
        "65534": "65534 stands for every id that has no name of its own: use another",
        "4294967295": "4294967295 is too large, the maximum is 4294967294",
    },
    "audit-log": {"": MISSING},
    "audit-sync": {"sometimes": "unknown value 'sometimes'; known are never, line", "": MISSING},
    "audit-rotate": {
        "x": NOT_A_NUMBER,
        "1.5": "'1.5' is not a whole number",
        "-5": "-5 is too small, the minimum is 0",
        "1048577": "1048577 is too large, the maximum is 1048576",
        "99999999999999": "99999999999999 is too large, the maximum is 1048576",
    },
    "audit-copy": {"everywhere": "unknown value 'everywhere'; known are none, stdout, journal, auto"},
    "policy": {"": MISSING},
    "require-sandbox": {
        "yes": "'yes' is not true or false",
        "on": "'on' is not true or false",
        "": MISSING,
        "2": "'2' is not true or false",
    },
    "traceable": {"yes": "'yes' is not true or false"},
}
SWITCHES = {name for name, metavar, *_ in OPTIONS if not metavar}
CASES = [(name, text, said) for name, cases in WRONG.items() for text, said in cases.items()]


def test_every_option_has_a_wrong_value_here() -> None:
    assert WRONG.keys() == VARIABLES.keys()


@pytest.mark.parametrize(("name", "text", "said"), CASES, ids=[f"{name}={text}" for name, text, _ in CASES])
def test_a_wrong_value_is_one_sentence_that_names_its_source(
    name: str, text: str, said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if name not in SWITCHES:
        assert main([f"--{name}={text}"]) == 2
        assert capfd.readouterr().err == f"qat-helper: --{name}: {said}\n"
    monkeypatch.setenv(VARIABLES[name], text)
    assert main([]) == 2
    assert capfd.readouterr().err == f"qat-helper: {VARIABLES[name]}: {said}\n"


@pytest.mark.parametrize("name", sorted(SWITCHES))
@pytest.mark.parametrize(("text", "value"), [("1", True), ("true", True), ("True", True), ("TRUE", True), ("0", False)])
def test_a_switch_is_true_or_false_as_the_servers_are(
    name: str, text: str, value: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLES[name], text)
    assert vars(parse([]))[name.replace("-", "_")] is value
    assert vars(parse([f"--{name}"]))[name.replace("-", "_")] is True, "an option wins over its variable"


UNKNOWN = {
    "QAT_HELPER_POLCY": "known are QAT_HELPER_SYSFS_ROOT, ",
    "QAT_HELPER_REQUIRE_SANDBOXES": "known are QAT_HELPER_SYSFS_ROOT, ",
    "QAT_HELPER_": "known are QAT_HELPER_SYSFS_ROOT, ",
    "QAT_HELPER_SERVICE_HOST": "a Service of this name sets it; set enableServiceLinks: false in the pod",
    "QAT_HELPER_SERVICE_PORT_HTTP": "a Service of this name sets it; set enableServiceLinks: false in the pod",
    "QAT_HELPER_PORT": "a Service of this name sets it; set enableServiceLinks: false in the pod",
    "QAT_HELPER_PORT_9090_TCP_ADDR": "a Service of this name sets it; set enableServiceLinks: false in the pod",
}


@pytest.mark.parametrize(("name", "said"), UNKNOWN.items(), ids=UNKNOWN)
def test_an_unknown_variable_is_refused(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A misspelt QAT_HELPER_POLICY would run the helper without a policy."""
    monkeypatch.setenv(name, "/etc/qat-plugin/policy.toml")
    assert main([]) == 2
    line = capfd.readouterr().err
    assert line.startswith(f"qat-helper: unknown variable {name}: {said}")
    assert line.count("\n") == 1


def test_other_variables_are_nobodys_business(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QAT_HELPE", "QAT_PLUGIN_SERVICE_HOST", "MY_QAT_HELPER_X", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.setenv(name, "x")
    assert parse([]).server_uid == 65532


@pytest.mark.parametrize("uid", ["0", "1", "65532", "65535", "4294967294"])
def test_other_ids_are_accepted(uid: str) -> None:
    """0 too: as root, a simulated node has it. On a real sysfs it is refused (test_helper_start_and_end.py)."""
    assert parse([f"--server-uid={uid}"]).server_uid == int(uid)


def test_the_error_is_of_the_helpers_own_kind() -> None:
    with pytest.raises(OptionError, match="--audit-rotate: -5 is too small"):
        parse(["--audit-rotate=-5"])
