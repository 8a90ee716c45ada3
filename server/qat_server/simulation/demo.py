"""`qat-plugin demo`: the main job, shown on a simulated node by the real helper and server.

Each step does something to the node, waits until it is *seen* to have the effect that it should (never for a time), and
prints what was seen. The exit status is 0 only when every step was.
"""

import asyncio
import hashlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qat_server.allocation import AllocationPolicy
from qat_server.naming import NAMESPACE, resource_of
from qat_server.simulation.config_map import ConfigMap
from qat_server.simulation.interception import InterceptionError
from qat_server.simulation.kubelet import AdmissionError, Allocation
from qat_server.simulation.node import Node, NodeError, demo_node, parse_node
from qat_server.simulation.running_node import RunningNode, SimulationError, command, running_node
from qat_server.status import Status
from qat_shared.devices import PHYSICAL, VIRTUAL

_HEALTH_INTERVAL: Final = 0.25  # seconds, so that the heartbeat's failure is soon seen


def run(node: Path | None, policy: AllocationPolicy, keep: bool, console: Console | None = None) -> int:
    """Run the demo; the exit status. `node` is a file with a node description (JSON), None the default node."""
    console = console or Console(highlight=False, soft_wrap=True)
    try:
        described = demo_node() if node is None else parse_node(node.read_bytes())
        if not described.pfs and not described.vfs:
            raise NodeError("the node description has neither PFs nor VFs: there is nothing to show")
        return asyncio.run(Demo(console, described, policy, keep).run())
    except (SimulationError, NodeError, InterceptionError, AdmissionError, OSError) as error:
        console.print(f"[red]demo failed:[/red] {escape(str(error))}")
        return 1


class Demo:
    """The steps, in order, on one running node."""

    def __init__(self, console: Console, node: Node, policy: AllocationPolicy, keep: bool) -> None:
        self.console = console
        self.node = node
        self.policy = policy
        self.keep = keep
        self._steps = 0
        self._exploring = False

    async def run(self) -> int:
        """All steps; the exit status. A signal ends it as cleanly as the last step does."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101
        received: list[int] = []

        def end(number: int) -> None:
            received.append(number)
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, end, number)
        try:
            await self._run()
        except asyncio.CancelledError:
            return 0 if self._exploring else 128 + received[0]
        return 0

    async def _run(self) -> None:
        began = time.monotonic()
        options = [f"--health-interval={_HEALTH_INTERVAL}s", f"--kernel-vf-drivers={_vf_drivers(self.node)}"]
        if self.policy is not AllocationPolicy.NONE:
            options.append(f"--allocation-policy={self.policy}")
        async with running_node(self.node, options) as node:
            config = ConfigMap(node.directory / "config")
            config.write({"qat.conf": "# all VFs are wanted; about services nothing is said yet\n"})
            node.add_server_options(f"--provisioning-config={config.directory}")
            self._show_node(node)
            await self._start(node)
            await self._provision(node)
            status = await self._bind(node)
            await self._register(node, status)
            allocations = await self._allocate(node)
            await self._heartbeat(node, status)
            await self._restart_kubelet(node, allocations)
            await self._change_services(node, config, allocations)
            self._show_audit(node)
            seen = f"[bold green]All {self._steps} steps were seen to happen[/bold green]"
            self.console.print(f"\n{seen} in {time.monotonic() - began:.1f} s.")
            if self.keep:
                await self._explore(node)
            else:
                self.console.print("To look around in such a node: .venv/bin/qat-plugin demo --keep")

    @asynccontextmanager
    async def _step(self, title: str) -> AsyncIterator[None]:
        began = time.monotonic()
        with self.console.status(f"{title} ..."):
            yield
        self._seen(f"{title} [dim]({(time.monotonic() - began) * 1000:.0f} ms)[/dim]")

    def _seen(self, what: str) -> None:
        self._steps += 1
        self.console.print(f"\n[green]✓[/green] [bold]{what}[/bold]")

    def _show_node(self, node: RunningNode) -> None:
        self.console.print(
            f"A node without hardware in {node.directory}: its kernel and its kubelet are emulated;"
            f" [bold]qat-helper[/bold] and [bold]qat-plugin[/bold] are real (here both as uid {os.geteuid()})."
        )
        table = Table(
            "PF", "device", "driver", "NUMA", "state", "services", "VFs", "VFs' driver", box=None, pad_edge=False
        )
        devices = node.kernel.snapshot()
        for pf in self.node.pfs:
            vfs = [device for device in devices.values() if device.pf == pf.pci_address]
            table.add_row(
                pf.address,
                f"8086:{pf.device}",
                pf.bound_to or "none",
                "-" if pf.numa_node is None else str(pf.numa_node),
                pf.state if pf.has_qat_attributes else "-",
                pf.services or "-",
                f"{len(vfs)} of {pf.total_vfs}",
                ", ".join(sorted({vf.driver or "none" for vf in vfs})) or "-",
            )
        for vf in self.node.vfs:
            table.add_row("(VF alone)", f"8086:{vf.device}", "", "", "", "", vf.address, vf.driver or "")
        self.console.print(table)

    async def _start(self, node: RunningNode) -> None:
        async with self._step("helper and server started"):
            node.start_helper()
            node.start_server()
            status = await node.until_status("the server reaches the helper", lambda status: status.helper.connected)
        assert node.helper is not None  # noqa: S101
        assert node.server is not None  # noqa: S101
        self.console.print(
            f"  helper pid {node.helper.pid} (as root on a real node), server pid {node.server.pid} (unprivileged),"
            f" version {status.version}"
        )

    async def _provision(self, node: RunningNode) -> None:
        bare = [
            pf for pf in self.node.pfs if pf.total_vfs and not pf.enabled_vfs and PHYSICAL[pf.device_id].provisioned
        ]
        if not bare:
            return
        names = ", ".join(pf.address for pf in bare)
        async with self._step(f"PF {names}: VFs enabled by the helper, as qat.conf wants"):
            await node.until_status(
                "the VFs are there", lambda status: all(_stage(status, pf.address) == "done" for pf in bare)
            )
        for pf in bare:
            path = node.kernel.sysfs_root / "bus/pci/devices" / pf.address / "sriov_drivers_autoprobe"
            if path.read_text() != "0\n":
                raise SimulationError(f"the VFs of {pf.address} went through the kernel's VF driver")
        self.console.print("  without the kernel's VF driver in between (sriov_drivers_autoprobe is 0)")

    async def _bind(self, node: RunningNode) -> Status:
        async with self._step("every VF bound to vfio-pci by the helper"):
            status = await node.until_status(
                "every VF is bound",
                lambda status: status.ready and status.vfs and all(vf.driver == "vfio-pci" for vf in status.vfs),
            )
        table = Table("PF", "VFs on vfio-pci", box=None, pad_edge=False, show_header=False)
        for pf in status.pfs:
            vfs = [vf.address for vf in status.vfs if vf.pf == pf.address]
            table.add_row(f"  PF {pf.address}", f"{len(vfs)}: {vfs[0]} .. {vfs[-1]}" if vfs else "none")
        self.console.print(table)
        return status

    async def _register(self, node: RunningNode, status: Status) -> None:
        wanted = {f"{NAMESPACE}/{resource.name}": resource.allocatable for resource in status.resources}
        async with self._step("resources registered with the kubelet"):
            await node.until("the kubelet knows the resources", lambda: node.kubelet.allocatable() == wanted)
        self._show_capacity(node)

    async def _allocate(self, node: RunningNode) -> dict[str, Allocation]:
        allocations = {}
        for pod, wanted in (("pod-a", 2), ("pod-b", 3)):
            resource, free = max(node.kubelet.allocatable_free().items(), key=lambda item: item[1])
            count = min(wanted, free)
            if not count:
                self.console.print(f"\n[dim]- no device is left for {pod}[/dim]")
                continue
            async with self._step(f"{pod} got {count} of {resource} (allocation policy {self.policy})"):
                allocations[pod] = await node.kubelet.allocate(pod, [("main", resource, count)])
            self._show_allocation(allocations[pod])
        first = next(iter(allocations.values()))
        vf = sorted(first.devices)[0]
        async with self._step(f"pod-a opened {vf}: seen as in use"):
            closer = node.kernel.open_vfio(vf)
            await node.until_status("the VF is in use", lambda status: _in_use(status, vf) is True)
            closer.close()
            await node.until_status("the VF is idle", lambda status: _in_use(status, vf) is False)
        return allocations

    async def _heartbeat(self, node: RunningNode, status: Status) -> None:
        pf = next((pf for pf in status.pfs if any(vf.pf == pf.address for vf in status.vfs)), None)
        if pf is None:
            self.console.print("\n[dim]- no PF on this node (as in a VM): no heartbeat to show[/dim]")
            return
        before = node.kubelet.allocatable()
        lost = sum(vf.pf == pf.address for vf in status.vfs)
        async with self._step(f"heartbeat of PF {pf.address} lost: its VFs ({lost}) are Unhealthy"):
            node.kernel.set_heartbeat(pf.address, -1)
            await node.until(
                "allocatable falls", lambda: sum(node.kubelet.allocatable().values()) == sum(before.values()) - lost
            )
        self._show_capacity(node)
        async with self._step(f"heartbeat of PF {pf.address} back: its VFs too"):
            node.kernel.set_heartbeat(pf.address, 0)
            await node.until("allocatable is as before", lambda: node.kubelet.allocatable() == before)

    async def _restart_kubelet(self, node: RunningNode, allocations: dict[str, Allocation]) -> None:
        before = node.kubelet.allocatable()
        async with self._step("kubelet restarted: resources registered again, pods keep their devices"):
            await node.kubelet.restart()
            await node.until("allocatable is as before", lambda: node.kubelet.allocatable() == before)
            for pod, allocation in allocations.items():
                if node.kubelet.devices_of(pod) != set(allocation.devices):
                    raise SimulationError(f"pod {pod} lost devices over the kubelet's restart")

    async def _change_services(self, node: RunningNode, config: ConfigMap, allocations: dict[str, Allocation]) -> None:
        status, before = await node.status(), node.kubelet.allocatable()
        held = {vf for allocation in allocations.values() for vf in allocation.devices}
        used = {vf.pf for vf in status.vfs if vf.address in held}
        pf = next((pf for pf in status.pfs if pf.services and pf.vfs and pf.address not in used), None)
        if pf is None:
            self.console.print("\n[dim]- pods use every PF whose services can be changed: a change would wait[/dim]")
            return
        wanted = "dc" if pf.services != "dc" else "sym;dc"
        old, new = (f"{NAMESPACE}/{resource_of(services)}" for services in (pf.services, wanted))
        async with self._step(f"ConfigMap swapped: PF {pf.address} from {pf.services} to {wanted}, without a restart"):
            config.write({"qat.toml": f'[[rules]]\naddress = "{pf.address}"\nservices = "{wanted}"\n'})
            expected = {old: before[old] - pf.vfs, new: before.get(new, 0) + pf.vfs}
            await node.until(
                "the VFs are in the other resource",
                lambda: {name: node.kubelet.allocatable().get(name) for name in expected} == expected,
            )
        self._show_capacity(node)

    def _show_audit(self, node: RunningNode) -> None:
        lines = node.audit_log.read_bytes().splitlines()
        previous = None
        for number, line in enumerate(lines, 1):
            record = json.loads(line)
            if previous is not None and record["previous"] != previous:
                raise SimulationError(f"line {number} of {node.audit_log} does not continue the line before")
            previous = hashlib.sha256(line).hexdigest()
        self._seen(f"the audit log of what root did: {len(lines)} lines, the chain of hashes intact")
        table = Table("line", "event", "operation", "of what", "verdict", "ms", box=None, pad_edge=False)
        by_operation: dict[str, list[dict[str, Any]]] = {}
        for record in map(json.loads, lines):
            by_operation.setdefault(record.get("operation") or "(helper)", []).append(record)
        for operation, records in by_operation.items():
            shown = list({record["event"]: record for record in reversed(records)}.values())[::-1]  # the first of each
            for record in shown:
                table.add_row(
                    str(record["sequence"]),
                    record["event"],
                    operation,
                    escape(" ".join(map(str, (record.get("arguments") or {}).values()))),
                    record.get("verdict") or "-",
                    f"{record['duration_ms']:.1f}" if record.get("duration_ms") is not None else "-",
                )
            if len(records) > len(shown):
                table.add_row("", "", f"[dim]{len(records) - len(shown)} lines more[/dim]")
        self.console.print(table)

    async def _explore(self, node: RunningNode) -> None:
        program = command("qat-plugin")[0]
        self.console.print(
            f"\nThe node goes on in {node.directory} until you press Ctrl-C. To look at it:\n"
            f"  {program} status --metrics-address 127.0.0.1:{node.metrics_port}\n"
            f"  curl -s http://127.0.0.1:{node.metrics_port}/metrics\n"
            f"  tail -f {node.audit_log}\n"
            f"  tail -f {node.directory}/run/server.log\n"
            f"  ls -l {node.kernel.sysfs_root}/bus/pci/devices/"
        )
        self._exploring = True
        while True:
            await asyncio.sleep(1)
            node.check_alive()

    def _show_capacity(self, node: RunningNode) -> None:
        for title, quantities in (("Capacity", node.kubelet.capacity()), ("Allocatable", node.kubelet.allocatable())):
            self.console.print(f"  {title}:")
            for resource, quantity in sorted(quantities.items()):
                self.console.print(f"    {resource + ':':<28} {quantity}")

    def _show_allocation(self, allocation: Allocation) -> None:
        for key, value in allocation.envs.items():
            self.console.print(f"    {key}={value}")
        self.console.print(f"    devices: {', '.join(allocation.device_nodes)}")
        if allocation.mounts:
            self.console.print(f"    mounts: {', '.join(allocation.mounts)}")


def _stage(status: Status, pf: str) -> str:
    return next((each.stage for each in status.provisioning if each.pf == pf), "")


def _in_use(status: Status, vf: str) -> bool | None:
    return next((seen.in_use for seen in status.vfs if seen.address == vf), None)


def _vf_drivers(node: Node) -> str:
    ids = {pf.vf_device_id for pf in node.pfs} | {int(vf.device, 16) for vf in node.vfs}
    return ",".join(sorted({VIRTUAL[number].driver for number in ids})) or "4xxxvf"
