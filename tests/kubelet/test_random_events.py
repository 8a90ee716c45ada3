"""Random sequences of what can happen to a node, with what must always hold checked after each event.

    QAT_KUBELET_SEQUENCES=1000 .venv/bin/pytest tests/kubelet/test_random_events.py

The sequences are always the same for a number: hypothesis makes them, without anything from a run before.
"""

import asyncio
import contextlib
import os
import signal
from typing import Final

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kubelet.answers import AdmissionError
from kubelet.nodes import CY, GENERIC, LONE, SMALL
from kubelet.production import ProductionNode, production_node
from kubelet.real_kubelet import RealKubelet
from qat_server.settings import Registration
from qat_server.simulation.topology import TopologyPolicy

SEQUENCES: Final = int(os.environ.get("QAT_KUBELET_SEQUENCES", "20"))
EVENTS: Final = 10
NUMBERS: Final = st.integers(0, 3)
ENDS: Final = st.sampled_from([signal.SIGTERM, signal.SIGKILL])
EITHER: Final = st.booleans()


class Events(RuleBasedStateMachine):
    """One node, in a VM (four lone VFs, which go and come back one by one) or not (two PFs with two VFs each)."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.stack = contextlib.AsyncExitStack()
        self.pods: dict[str, set[str]] = {}
        self.names = 0
        self.gone: set[str] = set()  # lone VFs that were removed
        self.off: set[str] = set()  # PFs without VFs
        self.sick: set[str] = set()  # PFs without a heartbeat
        self.node: ProductionNode[RealKubelet]

    # Its life

    @initialize(
        in_vm=EITHER,
        topology=st.sampled_from(TopologyPolicy),
        ours=st.sampled_from(["", "balanced", "packed"]),
        registration=st.sampled_from([Registration.KUBELET_SOCKET] * 2 + [Registration.PLUGIN_WATCHER]),
    )
    def start(self, in_vm: bool, topology: TopologyPolicy, ours: str, registration: Registration) -> None:
        self.in_vm = in_vm
        self.resource = GENERIC if in_vm else CY

        async def start() -> None:
            options = ("--health-interval=50ms", *([f"--allocation-policy={ours}"] if ours else []))
            node = production_node(LONE if in_vm else SMALL, options, topology, registration)
            self.node = await self.stack.enter_async_context(node)
            await self.node.start({self.resource: 4})

        self.runner.run(start())

    def teardown(self) -> None:
        try:
            self.runner.run(self.stack.aclose())
        finally:
            self.runner.close()

    # Events

    @rule(containers=st.lists(st.integers(1, 3), min_size=1, max_size=2))
    def a_pod_comes(self, containers: list[int]) -> None:
        self.runner.run(self.admit(containers))

    @rule(containers=st.lists(st.integers(1, 2), min_size=1, max_size=2), number=NUMBERS)
    def a_pod_comes_while_a_vf_goes(self, containers: list[int], number: int) -> None:
        async def both() -> None:
            going = asyncio.create_task(asyncio.to_thread(self.take_away, number))
            await self.admit(containers)
            await going

        self.runner.run(both())

    @precondition(lambda self: self.pods)
    @rule(which=NUMBERS)
    def a_pod_ends(self, which: int) -> None:
        pod = sorted(self.pods)[which % len(self.pods)]
        del self.pods[pod]
        self.runner.run(self.node.kubelet.free(pod))

    @precondition(lambda self: self.pods)
    @rule(which=NUMBERS)
    def a_container_restarts(self, which: int) -> None:
        pod = sorted(self.pods)[which % len(self.pods)]
        self.runner.run(self.node.kubelet.restart_container(pod, "c0"))

    @rule(number=NUMBERS)
    def a_vf_goes(self, number: int) -> None:
        self.take_away(number)

    @rule()
    def vfs_come_back(self) -> None:
        if self.in_vm:
            self.node.kernel.rescan()
            self.gone.clear()
        for pf in self.off:
            self.node.kernel.set_numvfs(pf, 2)
        self.off.clear()

    @rule(number=NUMBERS)
    def a_vf_is_unbound(self, number: int) -> None:
        address = f"0000:0{number + 1}:00.0" if self.in_vm else f"0000:{('6b', 'e8')[number % 2]}:00.1"
        with contextlib.suppress(OSError):  # it is gone, or on no driver
            self.node.kernel.unbind(address)

    @precondition(lambda self: not self.in_vm)
    @rule(number=NUMBERS, alive=EITHER)
    def a_heartbeat_changes(self, number: int, alive: bool) -> None:
        pf = SMALL.pfs[number % 2].address
        self.node.kernel.set_heartbeat(pf, 0 if alive else -1)
        (self.sick.discard if alive else self.sick.add)(pf)

    @rule(kill=EITHER)
    def the_kubelet_restarts(self, kill: bool) -> None:
        for refused in self.runner.run(self.node.kubelet.restart(kill)):
            self.pods.pop(refused.pod)

    @rule(how=ENDS)
    def the_server_restarts(self, how: signal.Signals) -> None:
        self.runner.run(self.node.stop_server(how))
        self.node.start_server()

    @rule(how=ENDS)
    def the_server_is_replaced(self, how: signal.Signals) -> None:
        async def replace() -> None:
            old = await self.node.replace_server()
            old.send_signal(how)
            await asyncio.to_thread(old.wait, 10)

        self.runner.run(replace())

    @rule(how=ENDS)
    def the_helper_restarts(self, how: signal.Signals) -> None:
        self.runner.run(self.node.stop_helper(how))
        self.node.start_helper()

    # What must always hold

    @invariant()
    def all_is_well(self) -> None:
        self.runner.run(self.look())

    async def look(self) -> None:
        kubelet = self.node.kubelet
        for safe in (False, True):  # while it is told, and after
            assert kubelet.alive
            assert (await kubelet.check()).violations == ()
            held = [id_ for pod in await kubelet.pods() for id_ in sorted(pod.devices)]
            assert len(held) == len(set(held)), "no device is given twice"
            assert {pod.pod: pod.devices for pod in await kubelet.pods()} == self.pods
            if not safe:
                await self.node.wait({self.resource: self.healthy()}, 30)
        assert await kubelet.healthy()

    # Means

    def healthy(self) -> int:
        """How many devices are, once all is settled: what was unbound by hand is bound again by then."""
        return 4 - len(self.gone) if self.in_vm else 2 * len({pf.address for pf in SMALL.pfs} - self.off - self.sick)

    def take_away(self, number: int) -> None:
        """All but one: a resource without devices is another matter, for the kubelet forgets it."""
        if self.in_vm:
            address = f"0000:0{number + 1}:00.0"
            if address not in self.gone and len(self.gone) < 3:
                self.gone.add(address)
                self.node.kernel.remove(address)
        elif not self.off:
            pf = SMALL.pfs[number % 2].address
            self.off.add(pf)
            self.node.kernel.set_numvfs(pf, 0)

    async def admit(self, containers: list[int]) -> None:
        self.names += 1
        name = f"pod-{self.names}"
        asked = [(f"c{n}", self.resource, number) for n, number in enumerate(containers)]
        with contextlib.suppress(AdmissionError):
            pod = await self.node.kubelet.allocate(name, asked)
            self.pods[name] = set(pod.devices)
            assert [len(container.envs) for container in pod.containers.values()] == containers


TestEvents = Events.TestCase
TestEvents.settings = settings(
    max_examples=SEQUENCES,
    stateful_step_count=EVENTS,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],  # the sequence that failed is shown as it is: to shrink it would take an hour
    suppress_health_check=list(HealthCheck),
)
