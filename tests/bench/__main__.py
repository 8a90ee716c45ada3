"""`make bench`: what the plugin costs, side by side with a plain grpc.aio service in the same run.

Latencies are ratios to a no-op service with the same messages, calls alternating between the two, so that what the
machine does meanwhile falls on both. Nothing here is a test: aims are printed beside what was measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import grpc
import grpc.aio
import uvloop

from bench.real_kubelet_times import kubelet_times
from qat_server.helper_client.client import HelperClient
from qat_server.instrumentation.counters import Counters
from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2 as api
from qat_server.kubelet.generated import deviceplugin_v1beta1_pb2_grpc as rpc
from qat_shared.pci import PciAddress
from qat_simulation.node.description import Node, Pf
from qat_simulation.running_node import RunningNode, running_node

CALLS: Final = 1500
IDLE_SECONDS: Final = 15
NOOP: Final = Path(__file__).with_name("noop_service.py")


def node_of(vfs: int) -> Node:
    """A node of Gen4 PFs with 16 VFs each."""
    pfs = tuple(
        Pf(address=f"{number // 16:04x}:{0x10 + number % 16 * 8:02x}:00.0", services="sym;asym", numa_node=number % 2)
        for number in range(vfs // 16)
    )
    return Node(pfs=pfs)


def show(name: str, measured: str, aim: str = "") -> None:
    """One row of the result."""
    print(f"  {name:<58}{measured:>22}   {aim}", flush=True)


def quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * q))]


async def alternate(
    ours: Callable[[], Awaitable[object]], plain: Callable[[], Awaitable[object]]
) -> tuple[list[float], ...]:
    """Seconds of each call of both, taken in turns; the first hundred warm up."""
    taken: tuple[list[float], ...] = ([], [])
    for number in range(CALLS + 100):
        for call, seconds in zip((ours, plain), taken, strict=True):
            began = time.perf_counter()
            await call()
            if number >= 100:
                seconds.append(time.perf_counter() - began)
    return taken


@asynccontextmanager
async def noop_service(directory: Path) -> AsyncIterator[rpc.DevicePluginAsyncStub]:
    """A plain grpc.aio service in a process of its own, that answers with nothing."""
    path = directory / "noop.sock"
    process = subprocess.Popen([sys.executable, str(NOOP), str(path)])
    try:
        async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
            await asyncio.wait_for(channel.channel_ready(), 20)
            yield rpc.DevicePluginStub(channel)
    finally:
        process.terminate()
        process.wait()


def memory(pid: int) -> float:
    """Resident MiB of a process."""
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(match[1]) / 1024 if match else float("nan")


def system_calls(pid: int, seconds: float) -> dict[str, int] | None:
    """System calls of a process and its threads and children in that time, by name; None without strace."""
    strace = shutil.which("strace")
    if strace is None:
        return None
    with tempfile.NamedTemporaryFile("r") as out:
        process = subprocess.Popen([strace, "-f", "-c", "-o", out.name, "-p", str(pid)], stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        process.wait()
        rows = re.findall(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$", out.read(), re.MULTILINE)
    return {name: int(count) for count, name in rows if name != "total"}


async def latencies(node: RunningNode, vfs: int, noop: rpc.DevicePluginAsyncStub) -> None:
    socket = node.kubelet.directory / "device-plugins" / "qat.intel.com" / "cy.sock"
    async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
        ours: rpc.DevicePluginAsyncStub = rpc.DevicePluginStub(channel)
        stream = ours.ListAndWatch(api.Empty())
        ids = [device.ID for device in (await anext(aiter(stream))).devices]
        stream.cancel()
        allocate = api.AllocateRequest(container_requests=[api.ContainerAllocateRequest(devices_ids=ids[:4])])
        prefer = api.PreferredAllocationRequest(
            container_requests=[api.ContainerPreferredAllocationRequest(available_deviceIDs=ids, allocation_size=4)]
        )
        for name, mine, plain in (
            ("Allocate of 4", lambda: ours.Allocate(allocate), lambda: noop.Allocate(allocate)),
            (
                "GetPreferredAllocation of 4",
                lambda: ours.GetPreferredAllocation(prefer),
                lambda: noop.GetPreferredAllocation(prefer),
            ),
        ):
            a, b = await alternate(mine, plain)
            aim = "aim at most 1.15" if vfs == 64 else ""
            for q in (0.5, 0.99):
                show(
                    f"{name}, {vfs} devices, p{q * 100:g}, ratio to no-op",
                    f"{quantile(a, q) / quantile(b, q):.2f} ({quantile(a, q) * 1e6:.0f}/{quantile(b, q) * 1e6:.0f} us)",
                    aim,
                )


async def reaction(node: RunningNode) -> None:
    """Time from an administrator's unbind (its uevent is sent within) to the new list at a ListAndWatch client."""
    socket = node.kubelet.directory / "device-plugins" / "qat.intel.com" / "cy.sock"
    address = str(next(a for a, d in sorted(node.kernel.snapshot().items()) if d.pf))
    times = []
    async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
        stub: rpc.DevicePluginAsyncStub = rpc.DevicePluginStub(channel)
        stream = stub.ListAndWatch(api.Empty())
        lists = aiter(stream)

        async def until_health(wanted: str) -> None:
            async for answer in lists:
                if any(address == device.ID and device.health == wanted for device in answer.devices):
                    return

        await until_health("Healthy")
        for _ in range(20):
            began = time.perf_counter()
            await asyncio.to_thread(node.kernel.unbind, address)
            await until_health("Unhealthy")
            times.append(time.perf_counter() - began)
            await until_health("Healthy")  # the server binds it again
        stream.cancel()
    show("uevent to new ListAndWatch list, median of 20", f"{statistics.median(times) * 1e3:.1f} ms", "aim under 50 ms")
    show("  the slowest of 20", f"{max(times) * 1e3:.1f} ms")


async def round_trip(node: RunningNode) -> None:
    client = HelperClient(node.helper_socket, Counters())
    task = asyncio.create_task(client.run())
    try:
        while not client.connected:
            await asyncio.sleep(0.01)
        pf = PciAddress.parse(str(next(a for a, d in node.kernel.snapshot().items() if d.pf is None)))
        times = []
        for _ in range(300):
            began = time.perf_counter()
            await client.heartbeat(pf)
            times.append(time.perf_counter() - began)
        show("helper round trip (ReadHeartbeat, in a child), p50", f"{statistics.median(times) * 1e6:.0f} us")
        show("  p99", f"{quantile(times, 0.99) * 1e6:.0f} us")
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def idle(node: RunningNode, vfs: int) -> None:
    """Between heartbeats, once all that follows a start has been done."""
    await asyncio.sleep(4)
    for name, process, aim in (("server", node.server, "aim under 20 a second"), ("helper", node.helper, "aim none")):
        assert process is not None
        calls = await asyncio.to_thread(system_calls, process.pid, IDLE_SECONDS)
        if calls is None:
            show(f"{name}: system calls while idle", "not measured", "strace is not installed")
            continue
        total = sum(calls.values())
        most = ", ".join(f"{n} {c}" for n, c in sorted(calls.items(), key=lambda item: -item[1])[:3])
        measured = f"{total} ({total / IDLE_SECONDS:.1f}/s)"
        show(f"{name}: system calls in {IDLE_SECONDS} idle s, {vfs} VFs", measured, f"{aim}; {most}")


async def heartbeats(vfs: int) -> None:
    """What the health check costs: system calls of both processes for each heartbeat of one PF."""
    async with running_node(node_of(vfs), (f"--max-num-devices={vfs}", "--health-interval=1s")) as node:
        node.start_helper()
        node.start_server()
        await node.until("all VFs are served", lambda: node.kubelet.allocatable() == {"qat.intel.com/cy": vfs}, 120)
        await asyncio.sleep(4)
        for name, process in (("server", node.server), ("helper", node.helper)):
            assert process is not None
            calls = await asyncio.to_thread(system_calls, process.pid, 10)
            if calls is not None:
                show(
                    f"{name}: system calls for each heartbeat of a PF", f"{sum(calls.values()) / 10 / (vfs // 16):.0f}"
                )


async def at(vfs: int) -> None:
    print(f"\n{vfs} VFs on {vfs // 16} PFs", flush=True)
    options = (f"--max-num-devices={vfs}", "--allocation-policy=balanced", "--health-interval=10m")
    async with running_node(node_of(vfs), options) as node:
        began = time.perf_counter()
        node.start_helper()
        node.start_server()
        expected = {"qat.intel.com/cy": vfs}
        await node.until("all VFs are served", lambda: node.kubelet.allocatable() == expected, 120)
        show("start of both to allocatable, every VF bound before", f"{time.perf_counter() - began:.2f} s")
        await node.stop_server()
        began = time.perf_counter()
        node.start_server()
        await node.until("all VFs are served", lambda: node.kubelet.allocatable() == expected, 120)
        show("start of the server to allocatable, VFs already bound", f"{time.perf_counter() - began:.2f} s")
        await idle(node, vfs)
        async with noop_service(node.directory) as noop:
            await latencies(node, vfs, noop)
        await reaction(node)
        await round_trip(node)
        assert node.helper is not None
        assert node.server is not None
        show("server: resident memory", f"{memory(node.server.pid):.0f} MiB", "aim 60 MiB")
        show("helper: resident memory", f"{memory(node.helper.pid):.0f} MiB", "aim 20 MiB")


async def main() -> None:
    print(f"{os.cpu_count()} CPUs, Python {sys.version.split()[0]}, grpcio {grpc.__version__}")
    for vfs in (64, 1024):
        await at(vfs)
    await heartbeats(64)
    await kubelet_times(show)


with contextlib.suppress(KeyboardInterrupt):
    uvloop.run(main())
