"""Metrics: the text that Prometheus scrapes for a State and Counters."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from qat_server.devices.inventory import Inventory
from qat_server.instrumentation.counters import Counters, Histogram
from qat_server.observability.metrics import registry, text
from qat_server.observability.state import State
from qat_shared import VERSION
from support.server_state import full_state


def counted() -> Counters:
    counters = Counters()
    counters.helper_request("BindDriver")
    counters.helper_request("BindDriver", "busy")
    counters.bind("vfio-pci", 0.02)
    counters.bind("vfio-pci", 20.0, "timed-out")
    counters.allocation("cy", 3)
    counters.allocation("cy", 2)
    counters.allocation("cy", 1, "unhealthy")
    counters.preferred_allocation("cy")
    counters.resync()
    counters.rescan(0.001)
    counters.audit_break()
    return counters


def scraped(state: State, counters: Counters) -> dict[str, float]:
    samples = {}
    for family in text_string_to_metric_families(text(registry(lambda: state, counters)).decode()):
        assert family.documentation
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            samples[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return samples


EXPECTED = {
    f"qat_plugin_build_info{{version={VERSION}}}": 1,
    "qat_plugin_ready": 0,
    "qat_plugin_devices{health=healthy,resource=cy}": 1,
    "qat_plugin_devices{health=unhealthy,resource=cy}": 2,
    "qat_plugin_vfs{driver=vfio-pci,use=idle}": 1,
    "qat_plugin_vfs{driver=vfio-pci,use=in_use}": 1,
    "qat_plugin_vfs{driver=4xxxvf,use=unknown}": 1,
    "qat_plugin_vfs{driver=none,use=unknown}": 1,
    "qat_plugin_vfs_cut": 1,
    "qat_plugin_vfs_foreign": 1,
    "qat_plugin_vfs_failed": 1,
    "qat_plugin_problems": 2,
    "qat_plugin_pf_info{driver=4xxx,numa_node=0,pf=0000:6b:00.0,services=sym;asym,state=up}": 1,
    "qat_plugin_pf_up{pf=0000:6b:00.0}": 1,
    "qat_plugin_pf_vfs{pf=0000:6b:00.0}": 4,
    "qat_plugin_pf_heartbeat{pf=0000:6b:00.0}": 0,
    "qat_plugin_registered{resource=cy}": 1,
    "qat_plugin_registered{resource=dc}": 0,
    "qat_plugin_registrations_total{resource=cy}": 2,
    "qat_plugin_helper_up": 1,
    "qat_plugin_audit_head_sequence": 17,
    "qat_plugin_audit_breaks_total": 1,
    "qat_plugin_uevents_total": 9,
    "qat_plugin_uevent_overruns_total": 1,
    "qat_plugin_helper_requests_total{operation=BindDriver,outcome=ok}": 1,
    "qat_plugin_helper_requests_total{operation=BindDriver,outcome=busy}": 1,
    "qat_plugin_bind_attempts_total{driver=vfio-pci}": 2,
    "qat_plugin_bind_failures_total{driver=vfio-pci,outcome=timed-out}": 1,
    "qat_plugin_bind_seconds_bucket{le=0.01}": 0,
    "qat_plugin_bind_seconds_bucket{le=0.025}": 1,
    "qat_plugin_bind_seconds_bucket{le=10.0}": 1,
    "qat_plugin_bind_seconds_bucket{le=+Inf}": 2,
    "qat_plugin_bind_seconds_count": 2,
    "qat_plugin_bind_seconds_sum": 20.02,
    "qat_plugin_allocations_total{outcome=ok,resource=cy}": 2,
    "qat_plugin_allocations_total{outcome=unhealthy,resource=cy}": 1,
    "qat_plugin_allocated_devices_total{resource=cy}": 5,
    "qat_plugin_preferred_allocations_total{outcome=ok,resource=cy}": 1,
    "qat_plugin_resyncs_total": 1,
    "qat_plugin_rescan_seconds_bucket{le=0.001}": 1,
    "qat_plugin_rescan_seconds_count": 1,
}


@pytest.fixture(scope="module")
def samples() -> dict[str, float]:
    return scraped(full_state(), counted())


@pytest.mark.parametrize("name", EXPECTED)
def test_sample(name: str, samples: dict[str, float]) -> None:
    assert samples[name] == EXPECTED[name]


def test_process_metrics(samples: dict[str, float]) -> None:
    assert samples["process_resident_memory_bytes"] > 0
    assert samples["process_open_fds"] > 0


def test_nothing_but_ours_and_the_process(samples: dict[str, float]) -> None:
    assert all(name.startswith(("qat_plugin_", "process_")) for name in samples)


def test_empty_server() -> None:
    samples = scraped(State(inventory=Inventory(pfs=(), vfs=(), cut=(), problems=())), Counters())

    assert samples["qat_plugin_ready"] == 1
    assert samples["qat_plugin_bind_seconds_count"] == 0


def test_state_is_read_at_each_scrape() -> None:
    ready = State(inventory=Inventory(pfs=(), vfs=(), cut=(), problems=()))
    states = iter([ready, State(inventory=ready.inventory, waits_for="no")])
    made = registry(lambda: next(states), Counters())

    assert b"qat_plugin_ready 1.0" in text(made)
    assert b"qat_plugin_ready 0.0" in text(made)


def test_a_bound_belongs_to_its_own_bucket() -> None:
    histogram = Histogram((1.0, 2.0))
    for seconds in (0.0, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(seconds)

    assert histogram.counts == [2, 2, 1]
