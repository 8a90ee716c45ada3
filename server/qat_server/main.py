"""The entry point of `qat-plugin`: runs the server, or a command if one is named. Owns exit statuses and error output.

Exit statuses: 0 success, 1 failure, 2 invalid command line or setting, 130 interrupted, 143 terminated. Every error
that a user can cause or encounter is printed as one sentence.
"""

import os
import signal
import sys
from collections.abc import Mapping, Sequence

from qat_server.command_line.flags import PROGRAM, SERVER_FLAGS, SWITCHES, FlagError, from_environment, is_true, read
from qat_server.command_line.settings import Settings, SettingsError, check_sysfs_root, parse
from qat_shared import VERSION


def main() -> None:
    """The entry point."""
    # The kernel ignores SIGTERM for PID 1 of a container unless a handler is installed. The server's loop installs one,
    # but only after gRPC and other modules have been loaded, which takes a while.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(run(sys.argv[1:], os.environ))


def run(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command line and return its exit status."""
    try:
        return _run(arguments, environment)
    except (FlagError, SettingsError) as error:
        return _fail(str(error), 2)
    except BrokenPipeError:  # | head
        # Python must not write the rest of its buffer again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 1)
    except KeyboardInterrupt:
        return 130


def _run(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    line = read(arguments, (*SERVER_FLAGS, *SWITCHES))
    switches = {flag.name for flag in SWITCHES if is_true(flag.name, line.values.pop(flag.name, "false"))}
    if "version" in switches:
        sys.stdout.write(f"{PROGRAM} {VERSION}\n")
        return 0
    if switches or line.rest:
        from qat_server.command_line import application  # noqa: PLC0415 - 20 MiB that the server does not need

        if line.rest and line.rest[0] in ("true", "false", "1", "0", "t", "f"):
            word = line.rest[0]
            raise FlagError(
                f"unexpected argument {word!r}: a boolean flag takes its value after =, as in -logtostderr={word}"
            )
        if line.rest and line.values:
            raise FlagError(
                f"-{next(iter(line.values))} is a flag of the server: it has no meaning before {line.rest[0][:60]!r}"
            )
        return application.run([*line.rest, *(["--help"] if switches else [])])
    return _serve(parse(line.values, from_environment(environment)))


def _serve(settings: Settings) -> int:
    from qat_server.logs import handler  # noqa: PLC0415 - only with valid settings

    if os.geteuid() == 0 and not settings.allow_root:
        raise SettingsError("the server does not need root, and runs as root only with --allow-root")
    check_sysfs_root(settings.sysfs_root)
    try:
        handler.configure(settings.logging)
    except OSError as error:
        raise SettingsError(f"the log file {error.filename} cannot be written: {error.strerror}") from None
    # gRPC's core prints its own lines to stderr, for example about a lost peer. They are not events of the server.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from qat_server import process  # noqa: PLC0415 - gRPC and uvloop, only with valid settings

    return process.run(settings)


def _fail(sentence: str, status: int) -> int:
    sys.stderr.write(f"{PROGRAM}: {' '.join(sentence.split())}\n")
    return status


if __name__ == "__main__":
    main()
