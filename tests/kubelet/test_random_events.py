"""Random sequences of what can happen to a node, with what must always hold checked after each event.

    QAT_KUBELET_SEQUENCES=1000 QAT_KUBELET_SEED=2 .venv/bin/pytest -s tests/kubelet/test_random_events.py

The sequences are always the same for a seed: hypothesis makes them, without anything from a run before. One that fails
is shown with its events, and the ends of all logs.
"""

import asyncio
import contextlib
import functools
import itertools
import os
import signal
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, cast

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kubelet.answers import AdmissionError
from kubelet.model import OTHER, Kind, Model
from kubelet.production import ProductionNode, production_node
from kubelet.real_kubelet import RealKubelet
from qat_server.kubelet.registration.directories import Registration
from qat_simulation.kubelet.config_map import ConfigMap
from qat_simulation.kubelet.topology import TopologyPolicy

SEQUENCES: Final = int(os.environ.get("QAT_KUBELET_SEQUENCES", "20"))
SEED: Final = int(os.environ.get("QAT_KUBELET_SEED", "1"))
EVENTS: Final = 10
PATIENCE: Final = 90.0
"""Seconds within which all must have settled: generous, since a busy machine is slow."""
NUMBERS: Final = st.integers(0, 3)
ENDS: Final = st.sampled_from([signal.SIGTERM, signal.SIGKILL])
EITHER: Final = st.booleans()
_numbered: Final = itertools.count(1)


def event(**given: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A rule that notes that it is applied."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def happens(self: "Events", **values: Any) -> None:
            self.happened.append(f"{function.__name__} {values or ''}")
            function(self, **values)

        apply: Any = rule
        return cast(Callable[..., None], apply(**given)(happens))

    return decorate


@seed(SEED)
class Events(RuleBasedStateMachine):
    """One node of a kind that `model.py` tells of."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.stack = contextlib.AsyncExitStack()
        self.names = 0
        self.happened: list[str] = []
        self.node: ProductionNode[RealKubelet]
        self.model: Model

    # Its life

    @initialize(
        kind=st.sampled_from([Kind.PFS, Kind.PFS, Kind.VM, Kind.VM, Kind.PROVISIONED]),
        sick=st.sets(st.integers(0, 1), max_size=2),
        topology=st.sampled_from(TopologyPolicy),
        ours=st.sampled_from(["", "balanced", "packed"]),
        registration=st.sampled_from([Registration.KUBELET_SOCKET] * 2 + [Registration.PLUGIN_WATCHER]),
        drain=EITHER,
        together=EITHER,
    )
    def start(
        self,
        kind: Kind,
        sick: set[int],
        topology: TopologyPolicy,
        ours: str,
        registration: Registration,
        drain: bool,
        together: bool,
    ) -> None:
        self.model = model = Model(kind, drain)
        print(f"sequence {next(_numbered)} of seed {SEED}: {kind}, {topology}, {registration}")
        self.happened.append(f"{kind}, {topology}, {ours=}, {registration}, {drain=}, {sick=}, {together=}")
        options = ["--health-interval=50ms", "--resync-interval=1s"]
        options += [f"--allocation-policy={ours}"] * bool(ours) + ["--drain-for-reconfiguration"] * drain

        async def start() -> None:
            made = production_node(model.node(), options, topology, registration)
            self.node = node = await self.stack.enter_async_context(made)
            if kind is Kind.PROVISIONED:
                self.config = ConfigMap(node.directory / "config")
                self.config.write(model.configuration())
                node.add_server_options(f"--provisioning-config={self.config.directory}")
                # As on any node there is another pod: a new kubelet that names none is not believed that there is none.
                await node.kubelet.allocate(OTHER, [("main", "example.com/none", 1)])
            for number in sick:
                self.set_heartbeat(number, alive=False)
            node.start_helper()
            if together:
                await node.kubelet.stop()
                node.start_server()
                await node.kubelet.start()
            else:
                node.start_server()

        self.run(start())

    def teardown(self) -> None:
        try:
            self.runner.run(self.stack.aclose())
        finally:
            self.runner.close()

    # Events

    @event(containers=st.lists(st.integers(1, 3), min_size=1, max_size=2), which=NUMBERS)
    def a_pod_comes(self, containers: list[int], which: int) -> None:
        self.run(self.admit(containers, which))

    @event(containers=st.lists(st.integers(1, 2), min_size=1, max_size=2), number=NUMBERS)
    def a_pod_comes_while_vfs_go(self, containers: list[int], number: int) -> None:
        """Or, on a node that is provisioned, while the services change."""

        async def both() -> None:
            going = asyncio.create_task(asyncio.to_thread(self.take_away, number))
            await self.admit(containers, number)
            await going

        self.run(both())

    @event(which=NUMBERS)
    def a_pod_ends(self, which: int) -> None:
        for pod in self.some(which):
            del self.model.pods[pod]
            self.run(self.node.kubelet.free(pod))

    @event(which=NUMBERS)
    def a_container_restarts(self, which: int) -> None:
        for pod in self.some(which):
            self.run(self.node.kubelet.restart_container(pod, "c0"))

    @event(number=NUMBERS)
    def vfs_go(self, number: int) -> None:
        """Or, on a node that is provisioned, the services change."""
        self.take_away(number)

    @event()
    def vfs_come_back(self) -> None:
        if self.model.kind is Kind.VM:
            self.node.kernel.rescan()
        for pf in self.model.off:
            self.node.kernel.set_numvfs(pf, 2)
        self.model.all_are_back()

    @event(number=NUMBERS)
    def a_vf_is_unbound(self, number: int) -> None:
        with contextlib.suppress(OSError):  # it is gone, or on no driver
            self.node.kernel.unbind(self.model.vf(number))

    @event(number=NUMBERS, alive=EITHER)
    def a_heartbeat_changes(self, number: int, alive: bool) -> None:
        self.set_heartbeat(number, alive)

    @event(kill=EITHER)
    def the_kubelet_restarts(self, kill: bool) -> None:
        self.forget(self.run(self.node.kubelet.restart(kill)))

    @event(how=ENDS)
    def the_server_restarts(self, how: signal.Signals) -> None:
        self.run(self.node.stop_server(how))
        self.node.start_server()

    @event(how=ENDS, kill=EITHER, server_first=EITHER, number=st.none() | NUMBERS)
    def both_start_at_the_same_time(
        self, how: signal.Signals, kill: bool, server_first: bool, number: int | None
    ) -> None:
        """While both are away, VFs may go (or the services change)."""

        async def restart() -> None:
            await self.node.stop_server(how)
            await self.node.kubelet.stop(kill)
            if number is not None:
                self.take_away(number)
            if server_first:
                self.node.start_server()
            starting = asyncio.create_task(self.node.kubelet.start())
            if not server_first:
                self.node.start_server()
            self.forget(await starting)

        self.run(restart())

    @event(how=ENDS)
    def the_server_is_replaced(self, how: signal.Signals) -> None:
        async def replace() -> None:
            old = await self.node.replace_server()
            old.send_signal(how)
            await asyncio.to_thread(old.wait, 60)

        self.run(replace())

    @event(how=ENDS)
    def the_helper_restarts(self, how: signal.Signals) -> None:
        self.run(self.node.stop_helper(how))
        self.node.start_helper()

    # What must always hold

    @invariant()
    def all_is_well(self) -> None:
        self.run(self.look())

    async def look(self) -> None:
        kubelet = self.node.kubelet
        for settled in (False, True):
            assert kubelet.alive
            assert (await kubelet.check()).violations == ()
            pods = {pod.pod: pod.devices for pod in await kubelet.pods() if pod.pod != OTHER}
            held = [id_ for devices in pods.values() for id_ in devices]
            assert len(held) == len(set(held)), "no device is given twice"
            assert pods == self.model.pods
            if not settled:
                await self.settle()
        assert await kubelet.healthy()

    async def settle(self) -> None:
        """Until all is allocatable that should be. A resource without a healthy device may be one that is not known."""
        self.model.settle()
        wanted = self.model.allocatable()
        deadline = time.monotonic() + PATIENCE
        while True:
            seen = await self.node.kubelet.allocatable()
            if {name: seen.get(name, 0) for name in wanted} == wanted:
                return
            self.node.check_alive()
            assert time.monotonic() < deadline, f"wanted {wanted}, and there is {seen}"
            await asyncio.sleep(0.005)

    # Means

    def some(self, which: int) -> list[str]:
        """One of the pods that run, if any do. (No precondition: which pods run is not the same each time.)"""
        pods = sorted(self.model.pods)
        return pods[which % len(pods) :][:1] if pods else []

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Do it. What fails is told with all that has happened."""
        try:
            return self.runner.run(coroutine)
        except BaseException as error:
            error.add_note("\n".join(("what happened:", *self.happened)))
            with contextlib.suppress(AttributeError):  # it did not come to be
                error.add_note(self.node.tails(60))
                error.add_note(self.node.kubelet.log_tail())
            raise

    def set_heartbeat(self, number: int, alive: bool) -> None:
        if self.model.pfs:
            pf = self.model.heartbeat(number, alive)
            self.node.kernel.set_heartbeat(pf, 0 if alive else -1)

    def take_away(self, number: int) -> None:
        """A VF, or a PF's; all of them may go. On a node that is provisioned, services change instead."""
        gone = self.model.take_away(number)
        if self.model.kind is Kind.PROVISIONED:
            self.config.write(self.model.configuration())
        elif gone and self.model.kind is Kind.VM:
            self.node.kernel.remove(gone)
        elif gone:
            self.node.kernel.set_numvfs(gone, 0)

    def forget(self, refused: Any) -> None:
        for each in refused:
            self.model.pods.pop(each.pod)

    async def admit(self, containers: list[int], which: int) -> None:
        self.names += 1
        name, resource = f"pod-{self.names}", self.model.resource(which)
        asked = [(f"c{n}", resource, number) for n, number in enumerate(containers)]
        known = resource in await self.node.kubelet.capacity()
        with contextlib.suppress(AdmissionError):
            pod = await self.node.kubelet.allocate(name, asked)
            if not pod.devices:  # the kubelet knows no such resource (yet), which its device manager lets pass
                assert not known
                await self.node.kubelet.free(name)
                return
            self.model.pods[name] = set(pod.devices)
            assert [len(container.envs) for container in pod.containers.values()] == containers


TestEvents = Events.TestCase
TestEvents.settings = settings(
    max_examples=SEQUENCES,
    stateful_step_count=EVENTS,
    database=None,
    deadline=None,
    phases=[Phase.generate],  # the sequence that failed is shown as it is: to shrink it would take an hour
    suppress_health_check=list(HealthCheck),
)
