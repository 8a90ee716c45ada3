"""Prometheus metrics (qat_plugin_*), made from the State and the Counters at each scrape. Nothing is kept here.

A new metric is a row here, with its number from a field of State or of Counters. Import this module only if
--metrics-address is set: it imports prometheus_client.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from qat_server.instrumentation.counters import Counters, Histogram
from qat_server.observability.readiness import not_ready
from qat_server.observability.state import State
from qat_server.provisioning.progress import Stage
from qat_shared import VERSION

PREFIX: Final = "qat_plugin_"
CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4


def registry(state: Callable[[], State], counters: Counters) -> CollectorRegistry:
    """A registry of the plugin's and the process's (process_*) metrics. `state` is called at each scrape."""
    made = CollectorRegistry(auto_describe=False)
    made.register(PluginCollector(state, counters))
    ProcessCollector(registry=made)
    return made


def text(source: CollectorRegistry) -> bytes:
    """The body of /metrics."""
    return generate_latest(source)


class PluginCollector(Collector):
    """All metrics named qat_plugin_*."""

    def __init__(self, state: Callable[[], State], counters: Counters) -> None:
        self._state = state
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        """Make all metric families."""
        state = self._state()
        yield _gauge("build_info", "Constant 1; the label is the version.", ("version",), {(VERSION,): 1})
        yield _gauge("ready", "1 if /readyz returns 200.", (), {(): not not_ready(state)})
        yield from _device_metrics(state)
        yield from _provisioning_metrics(state)
        yield from _kubelet_metrics(state)
        yield from _helper_metrics(state)
        yield from _sandbox_metrics(state)
        yield _counter("uevents", "Kernel uevents of PCI devices or drivers.", (), {(): state.uevents})
        yield _counter(
            "uevent_overruns",
            "Times the kernel dropped uevents; each causes a resync.",
            (),
            {(): state.uevent_overruns},
        )
        yield from _counted(self._counters)


def _device_metrics(state: State) -> Iterator[Metric]:
    inventory = state.inventory
    devices: Counter[tuple[str, ...]] = Counter()
    for name, listed in state.listing.items():
        devices[name, "healthy"] = devices[name, "unhealthy"] = 0
        for device in listed:
            devices[name, "healthy" if device.healthy else "unhealthy"] += 1
    yield _gauge("devices", "Devices listed to the kubelet.", ("resource", "health"), devices)

    use = {True: "in_use", False: "idle", None: "unknown"}
    yield _gauge(
        "vfs",
        "VFs by driver and by whether a process has them open.",
        ("driver", "use"),
        Counter((vf.driver or "none", use[vf.in_use]) for vf in inventory.vfs),
    )
    yield _gauge("vfs_cut", "VFs in excess of --max-num-devices, which are not served.", (), {(): len(inventory.cut)})
    yield _gauge(
        "vfs_foreign",
        "VFs that were bound to another driver outside the plugin, which are not served.",
        (),
        {(): len(state.foreign)},
    )
    yield _gauge("vfs_failed", "VFs that could not be bound.", (), {(): len(state.failures)})
    yield _gauge(
        "problems",
        "Devices or attributes that could not be read or used; /status lists them.",
        (),
        {(): len(inventory.problems)},
    )
    yield _gauge(
        "pf_info",
        "Constant 1; labels describe the PF.",
        ("pf", "driver", "numa_node", "state", "services"),
        {
            (
                str(pf.address),
                pf.driver or "none",
                "" if pf.numa_node is None else str(pf.numa_node),
                pf.state or "unknown",
                pf.services or "",
            ): 1
            for pf in inventory.pfs
        },
    )
    yield _gauge("pf_vfs", "VFs enabled on a PF.", ("pf",), {(str(pf.address),): len(pf.vfs) for pf in inventory.pfs})
    yield _gauge(
        "pf_up",
        "1 if qat/state is up; PFs without that file are omitted.",
        ("pf",),
        {(str(pf.address),): pf.state == "up" for pf in inventory.pfs if pf.state is not None},
    )
    yield _gauge(
        "pf_heartbeat",
        "1 if a PF answered its last heartbeat query; PFs that were never queried are omitted.",
        ("pf",),
        {(str(address),): alive for address, alive in state.heartbeats.items()},
    )


def _provisioning_metrics(state: State) -> Iterator[Metric]:
    yield _gauge(
        "provisioning_pfs",
        "PFs by provisioning stage.",
        ("stage",),
        {(stage,): sum(each.stage == stage for each in state.provisioning.values()) for stage in Stage}
        if state.provisioning
        else {},
    )
    yield _gauge(
        "provisioning_held",
        "Containers and processes that use VFs of a PF that waits to be provisioned; /status names them.",
        ("pf",),
        {(str(pf),): len(each.held_by) for pf, each in state.provisioning.items() if each.held_by},
    )
    yield _gauge(
        "provisioning_configuration_error",
        "1 if the current provisioning configuration is invalid.",
        (),
        {(): bool(state.provisioning_error)},
    )


def _kubelet_metrics(state: State) -> Iterator[Metric]:
    endpoints = state.endpoints
    yield _gauge(
        "registered",
        "1 if the resource is registered with the kubelet.",
        ("resource",),
        {(name,): endpoint.registered for name, endpoint in endpoints.items()},
    )
    yield _counter(
        "registrations",
        "Successful registrations with the kubelet.",
        ("resource",),
        {(name,): endpoint.registrations for name, endpoint in endpoints.items()},
    )


def _helper_metrics(state: State) -> Iterator[Metric]:
    helper = state.helper
    yield _gauge("helper_up", "1 if the helper is connected.", (), {(): helper.connected})
    yield _gauge(
        "audit_head_sequence",
        "Sequence number of the last line of the helper's audit log.",
        (),
        {(): helper.audit_sequence},
    )


def _sandbox_metrics(state: State) -> Iterator[Metric]:
    layers = {"helper": state.helper.sandbox, "server": state.sandbox}
    yield _gauge(
        "sandbox",
        "1 if this layer of the process's sandbox is complete; /status lists the missing parts.",
        ("process", "layer"),
        {(process, layer): not lack for process, found in layers.items() for layer, lack in found.items()},
    )


def _counted(counters: Counters) -> Iterator[Metric]:
    yield _counter("helper_requests", "Requests to the helper.", ("operation", "outcome"), counters.helper_requests)
    yield _counter(
        "audit_breaks",
        "Times the helper's audit log did not continue from its last known line.",
        (),
        {(): counters.audit_breaks},
    )
    yield _counter("bind_attempts", "Attempts to bind a VF.", ("driver",), _labelled(counters.bind_attempts))
    yield _counter("bind_failures", "Failed attempts to bind a VF.", ("driver", "outcome"), counters.bind_failures)
    yield _histogram("bind_seconds", "Time to bind a VF through the helper.", counters.bind_seconds)
    yield _counter(
        "allocations",
        "Containers for which the kubelet requested devices.",
        ("resource", "outcome"),
        counters.allocations,
    )
    yield _counter(
        "allocated_devices", "Devices allocated to containers.", ("resource",), _labelled(counters.allocated_devices)
    )
    yield _counter(
        "preferred_allocations",
        "Preferred allocations requested by the kubelet.",
        ("resource", "outcome"),
        counters.preferred_allocations,
    )
    yield _counter("resyncs", "Full resyncs.", (), {(): counters.resyncs})
    yield _histogram("rescan_seconds", "Time to read the devices from sysfs.", counters.rescan_seconds)


def _labelled(counts: Mapping[str, int]) -> dict[tuple[str, ...], int]:
    return {(label,): count for label, count in counts.items()}


def _gauge(
    name: str, help_text: str, labels: tuple[str, ...], samples: Mapping[tuple[str, ...], int | bool]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(PREFIX + name, help_text, labels=labels)
    for values, number in samples.items():
        family.add_metric(values, float(number))
    return family


def _counter(
    name: str, help_text: str, labels: tuple[str, ...], samples: Mapping[tuple[str, ...], int]
) -> CounterMetricFamily:
    family = CounterMetricFamily(PREFIX + name, help_text, labels=labels)  # shown as <name>_total
    for values, number in samples.items():
        family.add_metric(values, float(number))
    return family


def _histogram(name: str, help_text: str, histogram: Histogram) -> HistogramMetricFamily:
    family = HistogramMetricFamily(PREFIX + name, help_text)
    bounds = [*(str(bound) for bound in histogram.bounds), "+Inf"]
    family.add_metric((), list(zip(bounds, map(float, accumulate(histogram.counts)), strict=True)), histogram.total)
    return family
