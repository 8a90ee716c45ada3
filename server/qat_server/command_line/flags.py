"""The table of the server's flags, and the parser of Go-style command lines.

This module parses command lines, not typer: users come from a program that uses Go's flag package, whose rules differ
from getopt's. A long name may follow one dash (-name value, -name=value, --name value, --name=value), a value may begin
with a dash, a boolean takes a value only after "=", and parsing stops at the first argument that is not a flag.

Pure: arguments in, names and texts out. A new flag is a row here, a field and a `read` in settings.py, and an argument
in composition.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from msgspec import Struct

from qat_shared.values import boolean, check_variables

PROGRAM: Final = "qat-plugin"
ENVIRONMENT_PREFIX: Final = "QAT_PLUGIN_"
_NODE_NAME: Final = "NODE_NAME"  # the usual name in manifests that set it through the downward API


class FlagError(Exception):
    """The command line is invalid: one sentence."""


class Flag(Struct, frozen=True):
    """One flag. `metavar` is "" for a boolean. `klog`: it is one of klog's. `effect`: False if it is only accepted."""

    name: str
    default: str
    metavar: str
    help: str
    klog: bool = False
    effect: bool = True

    @property
    def boolean(self) -> bool:
        """Whether the flag without a value means true."""
        return not self.metavar

    @property
    def variable(self) -> str:
        """The environment variable of the flag. The flag takes precedence."""
        return ENVIRONMENT_PREFIX + self.name.replace("-", "_").upper()


class CommandLine(Struct, frozen=True):
    """Flag names with their texts (the last of each), and the arguments from the first one that is not a flag."""

    values: dict[str, str]
    rest: tuple[str, ...]


SERVER_FLAGS: Final = (
    Flag("dpdk-driver", "vfio-pci", "DRIVER", "driver to bind VFs to: vfio-pci or igb_uio"),
    Flag("kernel-vf-drivers", "4xxxvf,420xxvf", "LIST", "comma-separated kernel VF drivers whose devices are served"),
    Flag("max-num-devices", "64", "N", "maximum number of VFs to serve; the first in address order are served"),
    Flag("allocation-policy", "", "POLICY", "balanced or packed; if unset, the first free VFs in address order"),
    Flag("mode", "dpdk", "MODE", "dpdk (kernel is planned for a later version)"),
    Flag("sysfs-root", "/sys", "DIR", "sysfs mount point"),
    Flag("kubelet-dir", "/var/lib/kubelet", "DIR", "the kubelet's --root-dir"),
    Flag("helper-socket", "/run/qat-plugin/helper.sock", "PATH", "socket that qat-helper listens on"),
    Flag(
        "registration",
        "kubelet-socket",
        "METHOD",
        "registration with the kubelet: kubelet-socket, or plugin-watcher, which lets the server pose as any plugin",
    ),
    Flag(
        "metrics-address",
        "",
        "HOST:PORT",
        "serve /healthz, /readyz and /metrics at this address; off if unset",
    ),
    Flag(
        "status-http",
        "false",
        "",
        "also serve /status, and the reasons in /readyz, at --metrics-address: they name pods and devices",
    ),
    Flag(
        "provisioning-config",
        "",
        "DIR",
        "provision PFs according to qat.conf and qat.toml in this directory; off if unset",
    ),
    Flag("node-name", "", "NAME", "node name; qat-NAME.conf takes precedence over qat.conf (also set by NODE_NAME)"),
    Flag(
        "drain-for-reconfiguration",
        "false",
        "",
        "withhold a PF's VFs from new pods while the PF waits to be provisioned",
    ),
    Flag("health-interval", "5s", "DURATION", "time between heartbeat queries of a PF; 0 turns them off"),
    Flag("resync-interval", "1m", "DURATION", "time between full resyncs, in addition to uevents"),
    Flag("uevents", "netlink", "SOURCE", "source of uevents: netlink, or unix:PATH on a simulated node"),
    Flag("require-sandbox", "false", "", "do not start if any part of the sandbox is missing"),
    Flag("allow-root", "false", "", "run even as root, which the server does not need"),
    Flag("log-format", "text", "FORMAT", "text (klog's format) or json"),
    Flag("v", "0", "N", "verbosity: up to 4 for more detail, 5 and above for debugging", klog=True),
    Flag("vmodule", "", "LIST", "verbosity of single source files, for example discovery=4,sim*=2", klog=True),
    Flag("logtostderr", "true", "", "log to standard error instead of files", klog=True),
    Flag("alsologtostderr", "false", "", "log to standard error as well as to files", klog=True),
    Flag(
        "stderrthreshold",
        "ERROR",
        "SEVERITY",
        "when logging to files, also write messages of at least this severity to standard error",
        klog=True,
    ),
    Flag(
        "alsologtostderrthreshold",
        "INFO",
        "SEVERITY",
        "least severity that --alsologtostderr also writes to standard error",
        klog=True,
    ),
    Flag(
        "legacy_stderr_threshold_behavior",
        "true",
        "",
        "if false, --stderrthreshold also applies to --logtostderr",
        klog=True,
    ),
    Flag("log_dir", "", "DIR", "write log files to this directory (with --logtostderr=false)", klog=True),
    Flag("log_file", "", "PATH", "write to this log file (with --logtostderr=false)", klog=True),
    Flag("log_file_max_size", "1800", "MIB", "size at which --log_file is rotated; 0 turns rotation off", klog=True),
    Flag("one_output", "false", "", "write each line only to the file of its own severity", klog=True),
    Flag("add_dir_header", "false", "", "include the source file's directory in each line", klog=True),
    Flag("skip_headers", "false", "", "omit severity, time and source file from each line", klog=True),
    Flag("skip_log_headers", "false", "", "omit the header lines of log files", klog=True),
    Flag("log_backtrace_at", "", "FILE:N", "accepted for compatibility, without effect", klog=True, effect=False),
)
SWITCHES: Final = (
    Flag("help", "false", "", "show this help"),
    Flag("h", "false", "", "show this help"),
    Flag("version", "false", "", "show the version"),
)


def read(arguments: Sequence[str], flags: Iterable[Flag]) -> CommandLine:
    """Parse the flags at the front of a command line, as Go's flag.Parse does. Raises FlagError.

    `_` and `-` in a name are equivalent: --log-dir is --log_dir.
    """
    known = {_canonical(flag.name): flag for flag in flags}
    values: dict[str, str] = {}
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if len(argument) < 2 or argument[0] != "-":
            break
        position += 1
        if argument == "--":
            break
        name, equals, value = argument.removeprefix("-").removeprefix("-").partition("=")
        if not name or name[0] == "-":
            raise FlagError(f"bad flag syntax: {argument!r}")
        flag = known.get(_canonical(name))
        if flag is None:
            raise FlagError(_unknown(argument.partition("=")[0], name, known.values()))
        if not equals:
            if flag.boolean:
                value = "true"
            elif position == len(arguments):
                raise FlagError(f"flag {argument} needs a value ({flag.metavar})")
            else:
                value = arguments[position]
                position += 1
        values.pop(flag.name, None)
        values[flag.name] = value
    return CommandLine(values, tuple(arguments[position:]))


def plain(arguments: Sequence[str], flags: Iterable[Flag]) -> list[str]:
    """The command line in the form of getopt-like parsers: --name=value, or --name for a boolean that is true."""
    table = tuple(flags)
    booleans = {flag.name for flag in table if flag.boolean}
    line = read(arguments, table)
    words = []
    for name, value in line.values.items():
        if name not in booleans:
            words.append(f"--{name}={value}")
        elif is_true(name, value):
            words.append(f"--{name}")
    return [*words, *line.rest]


def is_true(name: str, value: str) -> bool:
    """The value of a switch. Raises FlagError."""
    try:
        return boolean(value)
    except ValueError as error:
        raise FlagError(f"--{name}: {error}") from None


def from_environment(environment: Mapping[str, str], flags: Sequence[Flag] = SERVER_FLAGS) -> dict[str, str]:
    """The flags set by environment variables (QAT_PLUGIN_DPDK_DRIVER=igb_uio).

    Empty variables are ignored, but those of booleans are passed on: a template without a value must not switch
    --require-sandbox off. Raises FlagError for a variable with this prefix that no flag has.
    """
    known = [flag.variable for flag in flags]
    try:
        check_variables(environment, ENVIRONMENT_PREFIX, known, lambda name: _hint(name, known))
    except ValueError as error:
        raise FlagError(str(error)) from None
    set_flags = [flag for flag in flags if flag.variable in environment]
    given = {flag.name: text for flag in set_flags if (text := environment[flag.variable]) or flag.boolean}
    if environment.get(_NODE_NAME):
        given.setdefault("node-name", environment[_NODE_NAME])
    return given


def _canonical(name: str) -> str:
    return name.replace("_", "-")


def _unknown(written: str, name: str, flags: Iterable[Flag]) -> str:
    dashes = written[: len(written) - len(written.lstrip("-"))]
    hint = _hint(name, [flag.name for flag in flags], dashes)
    return f"unknown flag {written}: {hint}"


def _hint(name: str, known: Sequence[str], dashes: str = "") -> str:
    from difflib import get_close_matches  # noqa: PLC0415 - only for a mistyped command line

    near = get_close_matches(name, known, n=1, cutoff=0.5)
    if not near:  # -v4, -logtostderr0
        near = sorted((each for each in known if name.startswith(each)), key=len)[-1:]
    return f"did you mean {dashes}{near[0]}?" if near else "--help lists all flags"
