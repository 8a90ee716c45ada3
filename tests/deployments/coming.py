"""Options that manifests name already and that this version of the programs may not have yet: left out where they run.

Each is of a change that is under way; an option that is neither known nor here is a mistake in a manifest.
"""

from collections.abc import Sequence
from typing import Final

from qat_helper import main as helper
from qat_server import flags

_COMING: Final = frozenset({"provisioning-config", "require-sandbox", "audit-copy"})


def without_unknown(which: str, arguments: Sequence[str]) -> list[str]:
    """The arguments of "helper" or "server" as manifests have them, without those that are still to come."""
    kept = []
    for argument in arguments:
        name = argument.lstrip("-").partition("=")[0]
        if name not in _COMING or name in _known(which):
            kept.append(argument)
    return kept


def _known(which: str) -> set[str]:
    if which == "server":
        return {flag.name for flag in flags.SERVER_FLAGS}
    return {row[0] for row in (*helper._OPTIONS, *getattr(helper, "_SWITCHES", ()))}
