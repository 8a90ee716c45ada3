"""Describe in plain words what a policy allows. Pure. The serving helper never imports this."""

from collections.abc import Iterable, Iterator

from qat_helper.operations.table import NAMES, OPERATIONS
from qat_helper.policy import ALL, Id, Policy, Rate
from qat_shared.devices import PHYSICAL
from qat_shared.messages import DpdkDriver, SocketDirectory

_CONSEQUENCES = {
    "PrepareSocketDirectory": "the server cannot serve unless its directory already exists",
    "RegisterResource": "the server cannot register, unless it uses the kubelet's plugin watcher",
    "OpenPodResources": "the server does not see which pods hold devices",
    "BindDriver": "the server serves only VFs that were bound by other means",
    "ReadHeartbeat": "the server does not notice a PF whose firmware hangs",
    "ReadDeviceConfig": "VFs whose PF has no services in sysfs are served as generic",
}


def explain(policy: Policy) -> str:
    """The description, in lines."""
    return "".join(f"{line}\n" for line in _lines(policy))


def _lines(policy: Policy) -> Iterator[str]:
    yield "Allowed operations:"
    allowed = [row for row in OPERATIONS.values() if row.name in policy.operations]
    for row in allowed:
        limit = policy.rates.get(row.name)
        yield f"  {row.name}: {_purpose(row.request)}" + (f" At most {_rate(limit)}." if limit else "")
    if not allowed:
        yield "  nothing"
    if any(row.audited for row in allowed):
        yield f"  All audited operations together: at most {_rate(policy.rates[ALL])}."
    if policy.operations != NAMES:
        yield "Denied operations (rule operations):"
        for name in sorted(NAMES - policy.operations):
            yield f"  {name}" + (f": {_CONSEQUENCES[name]}" if name in _CONSEQUENCES else "")
    yield "Allowed devices:"
    yield "  " + (
        "any address"
        if policy.addresses is None
        else f"only these addresses: {_list(sorted(policy.addresses)) or 'none'} (rule addresses)"
    )
    yield "  " + (
        "any QAT device id"
        if policy.device_ids is None
        else f"only these device ids: {_ids(policy.device_ids) or 'none'} (rule device_ids)"
    )
    yield from _limits(policy)


def _limits(policy: Policy) -> Iterator[str]:
    yield f"Drivers that a VF may be bound to: {_list(sorted(policy.drivers)) or 'none'}" + _rule(
        "drivers", narrowed=policy.drivers != frozenset(DpdkDriver)
    )
    yield (
        f"Kubelet directories in which the server may serve: {_list(sorted(policy.directories)) or 'none'}"
        + _rule("directories", narrowed=policy.directories != frozenset(SocketDirectory))
    )
    yield (
        "VFs that one PF may have: "
        + (
            "no limit"
            if policy.max_vfs is None
            else f"at most {policy.max_vfs}; QAT drivers enable all VFs of a PF, so a PF with more gets none"
        )
        + _rule("max_vfs", narrowed=policy.max_vfs is not None)
    )


def _purpose(request: type) -> str:
    """The first paragraph of the request's docstring, without the name of the answer."""
    text = " ".join((request.__doc__ or "").split("\n\n")[0].split())
    return text.partition(" Answer:")[0]


def _rate(rate: Rate) -> str:
    return f"{rate.burst} at once, then {rate.per_second:g} a second"


def _rule(name: str, *, narrowed: bool) -> str:
    return f" (rule {name})." if narrowed else "."


def _list(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _ids(ids: Iterable[Id]) -> str:
    return _list(
        (f"{vendor:04x}:{device:04x}" + (" (a PF)" if device in PHYSICAL else "") for vendor, device in sorted(ids))
    )
