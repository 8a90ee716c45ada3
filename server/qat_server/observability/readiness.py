"""Whether the server does all of its work: the reasons why not, now (`not_ready`) and for its start (`missing`).

The start waits for what a moment can bring: devices that are being probed, provisioned, bound or asked for their
services. It does not wait for the kubelet, which may be waiting for this start, nor for an operator.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

from qat_server.observability.state import State
from qat_shared import NAMESPACE


class Unfinished(Protocol):
    """A part of the server that knows what it has still to do."""

    def missing(self) -> Iterable[str]:
        """A sentence for each unfinished thing that a moment can bring."""


def not_ready(state: State) -> tuple[str, ...]:
    """The reasons why the server does not do all of its work; none when it does."""
    reasons = list(_obstacles(state))
    if state.holders_unknown and not state.waits_for:
        reasons.append(f"the devices that pods hold are not known yet: {state.holders_unknown}")
    reasons += [f"PF {address} is being provisioned" for address in state.changing]
    reasons += [
        f"{NAMESPACE}/{name} is not registered with the kubelet: {endpoint.error or 'registration is under way'}"
        for name, endpoint in state.endpoints.items()
        if not endpoint.registered
    ]
    return tuple(reasons)


def missing(state: State, parts: Iterable[Unfinished]) -> tuple[str, ...]:
    """The reasons why the start is not complete."""
    reasons = list(_obstacles(state))
    reasons += [f"{problem.address or 'PCI bus'}: {problem.text}" for problem in state.inventory.problems]
    for part in parts:
        reasons += part.missing()
    return tuple(reasons)


def _obstacles(state: State) -> Iterator[str]:
    if state.waits_for:
        yield state.waits_for
    # A directory that waits for the helper has given this reason already.
    if not state.helper.connected and state.helper.error not in state.waits_for:
        yield state.helper.error
    if not state.configured:
        yield f"no provisioning configuration: {state.provisioning_error or 'not read yet'}"
