"""Readiness: why the server is not ready (`not_ready`) or has not completed its start (`unfinished`).

The start waits for conditions that resolve quickly without anyone's help: devices that are being probed, provisioned,
bound or queried for their services. It waits neither for the kubelet, which may be waiting for this start, nor for an
operator.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

from qat_server.observability.state import State
from qat_shared import NAMESPACE


class Unfinished(Protocol):
    """A component of the server with work that its start may wait for."""

    def unfinished(self) -> Iterable[str]:
        """A sentence for each unfinished piece of work that the start waits for."""


def not_ready(state: State) -> tuple[str, ...]:
    """The reasons why the server does not do all of its work; empty if it is ready.

    /readyz and status show them in this order: what keeps it from serving, the helper, the configuration, unknown
    holders, provisioning, endpoints.
    """
    reasons = list(_obstacles(state))
    if state.holders_unknown and not state.waits_for:
        reasons.append(f"the devices that pods hold are not known yet: {state.holders_unknown}")
    reasons += [f"PF {address} is being provisioned" for address in state.working]
    reasons += [
        f"{NAMESPACE}/{name} is not registered with the kubelet: {endpoint.error or 'registration is in progress'}"
        for name, endpoint in state.endpoints.items()
        if not endpoint.registered
    ]
    return tuple(reasons)


def unfinished(state: State, components: Iterable[Unfinished]) -> tuple[str, ...]:
    """The reasons why the start is not complete; empty if it is."""
    reasons = list(_obstacles(state))
    reasons += [f"{problem.address or 'PCI bus'}: {problem.text}" for problem in state.inventory.problems]
    for component in components:
        reasons += component.unfinished()
    return tuple(reasons)


def _obstacles(state: State) -> Iterator[str]:
    if state.waits_for:
        yield state.waits_for
    # A socket directory that waits for the helper gives the same reason in `waits_for`.
    if not state.helper.connected and state.helper.error not in state.waits_for:
        yield state.helper.error
    if not state.configured:
        yield f"no provisioning configuration: {state.provisioning_error or 'not read yet'}"
