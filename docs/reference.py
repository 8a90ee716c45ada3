"""Writes configuration.md, the reference of all flags and commands, out of the code that reads them.

python docs/reference.py            write it
python docs/reference.py --check    say whether it is current (exit status 1 if not)
"""

import os
import subprocess
import sys
from pathlib import Path

import typer

from qat_server.command_line.application import app
from qat_server.command_line.flags import SERVER_FLAGS, Flag
from qat_simulation.running_node import command

PAGE = Path(__file__).with_name("configuration.md")
WIDTH = "110"


def table(flags: list[Flag]) -> list[str]:
    """A Markdown table of the server's flags."""
    rows = ["| flag | environment | default | |", "|---|---|---|---|"]
    for flag in flags:
        value = f" {flag.metavar}" if flag.metavar else ""
        default = f"`{flag.default}`" if flag.default else "none"
        rows.append(f"| `--{flag.name}{value}` | `{flag.variable}` | {default} | {flag.help} |")
    return rows


def help_of(program: str, *words: str) -> str:
    """What a program says to --help, as on a terminal of WIDTH columns."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("QAT_")}
    done = subprocess.run(
        [*command(program), *words, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=environment | {"COLUMNS": WIDTH, "TERMINAL_WIDTH": WIDTH},
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def page() -> str:
    """The whole text."""
    plugin = sorted(typer.main.get_group(app).commands)
    lines = [
        "# Configuration",
        "",
        "Made by `make docs` from the code that reads the flags. Flags of `qat-plugin` are written `-name value`,",
        "`-name=value`, `--name value` or `--name=value`; a boolean alone is true. A flag wins over its variable.",
        "",
        "## qat-plugin, the server",
        "",
        *table([flag for flag in SERVER_FLAGS if not flag.klog]),
        "",
        "### Logging",
        "",
        "The names are those of klog, which Intel's plugin has too.",
        "",
        *table([flag for flag in SERVER_FLAGS if flag.klog]),
        "",
        "## qat-plugin, the commands",
        "",
    ]
    for name in plugin:
        lines += [f"### qat-plugin {name}", "", "```", help_of("qat-plugin", name), "```", ""]
    lines += ["## qat-helper", "", "```", help_of("qat-helper"), "```"]
    for words in (("audit", "verify"), ("audit", "show"), ("policy", "check")):
        lines += ["", f"### qat-helper {' '.join(words)}", "", "```", help_of("qat-helper", *words), "```"]
    return "\n".join(lines) + "\n"


def main() -> None:
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text)
    elif PAGE.read_text() != text:
        sys.exit(f"{PAGE.name} is not what the flags are now: run make docs")


if __name__ == "__main__":
    main()
