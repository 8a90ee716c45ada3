"""The server's flags (one table) and Go-style command lines (-name value, -name=value, --name value, --name=value).

The command line is read here, not by typer: users come from a program that uses Go's flag package, whose rules differ
from getopt's (one dash before a long name; a value may begin with a dash; a boolean takes a value after "=" only;
reading stops at the first argument that is no flag). Pure: arguments in, names and texts out; settings.py knows what
the texts mean.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from msgspec import Struct

from qat_server.parsing.values import boolean

ENVIRONMENT_PREFIX: Final = "QAT_PLUGIN_"
_NODE_NAME: Final = "NODE_NAME"  # as manifests call it that set it by the downward API


class FlagError(Exception):
    """The command line cannot be read: one sentence."""


class Flag(Struct, frozen=True):
    """One flag. `metavar` is "" for a boolean. `effect` is False when it is accepted for klog's sake only."""

    name: str
    default: str
    metavar: str
    help: str
    klog: bool = False
    effect: bool = True

    @property
    def boolean(self) -> bool:
        """Whether the name alone means true."""
        return not self.metavar

    @property
    def variable(self) -> str:
        """The environment variable that stands for the flag; the flag wins."""
        return ENVIRONMENT_PREFIX + self.name.replace("-", "_").upper()


class CommandLine(Struct, frozen=True):
    """Flag names with their texts (the last of each wins), and the arguments from the first one that is no flag."""

    values: dict[str, str]
    rest: tuple[str, ...]


SERVER_FLAGS: Final = (
    Flag("dpdk-driver", "vfio-pci", "DRIVER", "driver to bind VFs to: vfio-pci or igb_uio"),
    Flag("kernel-vf-drivers", "4xxxvf,420xxvf", "LIST", "kernel VF drivers whose devices are served, with commas"),
    Flag("max-num-devices", "64", "N", "how many VFs are served at most: the first in address order"),
    Flag("allocation-policy", "", "POLICY", "balanced or packed; without it the first free VFs in address order"),
    Flag("mode", "dpdk", "MODE", "dpdk (kernel comes with a later version)"),
    Flag("sysfs-root", "/sys", "DIR", "where sysfs is"),
    Flag("kubelet-dir", "/var/lib/kubelet", "DIR", "the kubelet's --root-dir"),
    Flag("helper-socket", "/run/qat-plugin/helper.sock", "PATH", "where qat-helper listens"),
    Flag("registration", "kubelet-socket", "WAY", "how to register: kubelet-socket or plugin-watcher"),
    Flag("metrics-address", "", "HOST:PORT", "serve /healthz, /readyz, /metrics and /status there; off without it"),
    Flag("provisioning-config", "", "DIR", "provision PFs as qat.conf and qat.toml there say; off without it"),
    Flag("node-name", "", "NAME", "name in qat-NAME.conf, which wins over qat.conf (environment: NODE_NAME too)"),
    Flag("drain-for-reconfiguration", "false", "", "give no VF of a PF to new pods while it waits to be provisioned"),
    Flag("health-interval", "5s", "DURATION", "time between heartbeat queries of a PF; 0 for none"),
    Flag("resync-interval", "1m", "DURATION", "time between looks at everything, beside uevents"),
    Flag("uevents", "netlink", "SOURCE", "where uevents come from: netlink, or unix:PATH on a simulated node"),
    Flag("require-sandbox", "false", "", "do not start when any part of the sandbox is missing"),
    Flag("allow-root", "false", "", "run as root all the same: nothing here needs it"),
    Flag("log-format", "text", "FORMAT", "text (as klog) or json"),
    Flag("v", "0", "N", "verbosity: 0 to 4 detail, 5 and more debugging", klog=True),
    Flag("vmodule", "", "LIST", "verbosity for some source files: discovery=4,sim*=2", klog=True),
    Flag("logtostderr", "true", "", "log to standard error instead of files", klog=True),
    Flag("alsologtostderr", "false", "", "log to standard error as well as to files", klog=True),
    Flag("stderrthreshold", "ERROR", "SEVERITY", "beside files, what is this severe goes to standard error", klog=True),
    Flag("alsologtostderrthreshold", "INFO", "SEVERITY", "the same with --alsologtostderr", klog=True),
    Flag(
        "legacy_stderr_threshold_behavior",
        "true",
        "",
        "if false, --stderrthreshold counts with --logtostderr too",
        klog=True,
    ),
    Flag("log_dir", "", "DIR", "write log files there (with --logtostderr=false)", klog=True),
    Flag("log_file", "", "PATH", "write this log file (with --logtostderr=false)", klog=True),
    Flag("log_file_max_size", "1800", "MIB", "size at which --log_file is begun anew, 0 for none", klog=True),
    Flag("one_output", "false", "", "write a line to the file of its own severity only", klog=True),
    Flag("add_dir_header", "false", "", "show the source file's directory", klog=True),
    Flag("skip_headers", "false", "", "leave out severity, time and source file", klog=True),
    Flag("skip_log_headers", "false", "", "leave out the first lines of log files", klog=True),
    Flag("log_backtrace_at", "", "FILE:N", "accepted, without effect", klog=True, effect=False),
)
HELP: Final = Flag("help", "false", "", "show this help")
SWITCHES: Final = (HELP, Flag("h", "false", "", "as --help"), Flag("version", "false", "", "show the version"))


def read(arguments: Sequence[str], flags: Iterable[Flag]) -> CommandLine:
    """Read the flags at the front of a command line, as Go's flag.Parse does. Raises FlagError.

    `_` and `-` in a name are the same, so that --log-dir is --log_dir.
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
    """The same command line as getopt-like parsers read it: --name=value, --name for a boolean that is true."""
    table = tuple(flags)
    booleans = {flag.name for flag in table if flag.boolean}
    line = read(arguments, table)
    written = []
    for name, value in line.values.items():
        if name not in booleans:
            written.append(f"--{name}={value}")
        elif is_true(name, value):
            written.append(f"--{name}")
    return [*written, *line.rest]


def is_true(name: str, value: str) -> bool:
    """A switch's text. Raises FlagError."""
    try:
        return boolean(value)
    except ValueError as error:
        raise FlagError(f"--{name}: {error}") from None


def from_environment(environment: Mapping[str, str], flags: Iterable[Flag] = SERVER_FLAGS) -> dict[str, str]:
    """The flags that environment variables give (QAT_PLUGIN_DPDK_DRIVER=igb_uio); an empty one counts as not given."""
    given = {flag.name: environment[flag.variable] for flag in flags if environment.get(flag.variable)}
    if environment.get(_NODE_NAME):
        given.setdefault("node-name", environment[_NODE_NAME])
    return given


def _canonical(name: str) -> str:
    return name.replace("_", "-")


def _unknown(written: str, name: str, flags: Iterable[Flag]) -> str:
    from difflib import get_close_matches  # noqa: PLC0415 - for a mistyped command line only

    names = [flag.name for flag in flags]
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    if not near:  # -v4, -logtostderr0
        near = sorted((known for known in names if name.startswith(known)), key=len)[-1:]
    dashes = written[: len(written) - len(written.lstrip("-"))]
    hint = f"did you mean {dashes}{near[0]}?" if near else "--help lists all"
    return f"unknown flag {written}: {hint}"
