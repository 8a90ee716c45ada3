"""`qat-plugin`: the server when no command is named, else a command. Owns exit statuses and the last word on stderr.

0 done, 1 it could not be done, 2 the command line or a setting is wrong, 130 interrupted, 143 terminated. Every
error that a user can make or meet is one sentence.
"""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Final

from qat_server.command_line.flags import SERVER_FLAGS, SWITCHES, FlagError, from_environment, is_true, read
from qat_server.command_line.settings import Settings, SettingsError, check_sysfs_root, parse
from qat_shared import VERSION

PROGRAM: Final = "qat-plugin"


def main() -> None:
    """The entry point."""
    # For PID 1 of a container the kernel ignores SIGTERM while nobody handles it. The server's loop does, but gRPC and
    # all that comes before it take a while to load.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(run(sys.argv[1:], os.environ))


def run(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Do what a command line says; the exit status."""
    try:
        return _run(arguments, environment)
    except (FlagError, SettingsError) as error:
        return _fail(str(error), 2)
    except BrokenPipeError:  # | head
        # What is left in the buffer must not be tried again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 1)
    except KeyboardInterrupt:
        return 130


def settings_from(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """The server's settings; a flag wins over its variable. Raises FlagError and SettingsError."""
    line = read(arguments, SERVER_FLAGS)
    if line.rest:
        raise FlagError(f"unexpected argument {line.rest[0][:60]!r}")
    return parse(line.values, from_environment(environment))


def _run(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    line = read(arguments, (*SERVER_FLAGS, *SWITCHES))
    switches = {flag.name for flag in SWITCHES if is_true(flag.name, line.values.pop(flag.name, "false"))}
    if "version" in switches:
        sys.stdout.write(f"{PROGRAM} {VERSION}\n")
        return 0
    if switches or line.rest:
        from qat_server.command_line import application as commands  # noqa: PLC0415 - 20 MiB that the server does not need

        if line.rest and line.rest[0] in ("true", "false", "1", "0", "t", "f"):
            word = line.rest[0]
            raise FlagError(
                f"unexpected argument {word!r}: a boolean takes its value after =, as in -logtostderr={word}"
            )
        if line.rest and line.values:
            raise FlagError(
                f"-{next(iter(line.values))} is the server's: it has no meaning before {line.rest[0][:60]!r}"
            )
        return commands.run([*line.rest, *(["--help"] if switches else [])])
    return _serve(parse(line.values, from_environment(environment)))


def _serve(settings: Settings) -> int:
    from qat_server.logs import handler  # noqa: PLC0415 - only once the settings are good

    if os.geteuid() == 0 and not settings.allow_root:
        raise SettingsError("the server needs no root, and does not run as root unless told to: --allow-root")
    check_sysfs_root(settings.sysfs_root)
    try:
        handler.configure(settings.logging)
    except OSError as error:
        raise SettingsError(f"the log file {error.filename} cannot be written: {error.strerror}") from None
    # gRPC's core prints lines of its own to stderr (a peer that went away, for one), which are no events of ours.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from qat_server import process  # noqa: PLC0415 - gRPC and uvloop, once the settings are good

    return process.run(settings)


def _fail(sentence: str, status: int) -> int:
    sys.stderr.write(f"{PROGRAM}: {' '.join(sentence.split())}\n")
    return status


if __name__ == "__main__":
    main()
