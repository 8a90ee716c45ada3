"""The base on a real node: what pods get, what the two processes are, and what is seen of them."""

import errno
import re
from typing import Any

import pytest

from cluster.installation import Installation
from cluster.node import PYTHON, KubeletNode
from cluster.static_pod import workload
from deployments import rendered
from kernel.nodes import TWO_SMALL
from kubelet.nodes import CY

_RUNTIMES = {  # mount points that a container runtime or the kubelet makes in every container
    *("/", "/proc", "/dev", "/dev/pts", "/dev/mqueue", "/dev/shm", "/dev/termination-log", "/sys", "/sys/fs/cgroup"),
    *("/etc/hosts", "/etc/hostname", "/etc/resolv.conf"),
}


@pytest.fixture(autouse=True)
def _base(installed: Installation) -> None:
    installed.plugin(TWO_SMALL, rendered.render("base"))


def test_a_pod_gets_its_two_vfs_and_no_other(node: KubeletNode) -> None:
    assert len(node.resources(f"{CY}=4")["allocatable"][CY]) == 4
    node.apply(workload("two", {CY: 2}))
    seen = node.client("two")
    addresses = [seen["environment"][name] for name in ("QAT0", "QAT1")]
    assert sorted(name for name in seen["environment"] if name.startswith("QAT")) == ["QAT0", "QAT1"]
    assert node.resources()["pods"]["two-node"] == {"main": {CY: sorted(addresses)}}
    groups = {address: node.group(address) for address in addresses}
    assert {address: each["group"] for address, each in seen["devices"].items()} == groups
    assert {each["id"] for each in seen["devices"].values()} == {"8086:4941"}
    assert seen["vfio"] == sorted(["vfio", *map(str, groups.values())])
    # The kernel says the same: these two are open, and no other.
    others = [address for address in node.vfs() if address not in addresses]
    assert len(others) == 2
    assert {address: node.is_open(address) for address in (*addresses, *others)} == {
        **dict.fromkeys(addresses, True),
        **dict.fromkeys(others, False),
    }
    # Nor does it help to make another's device file, as root with the runtime's usual capabilities (CAP_MKNOD).
    pairs = [f"{node.group(address)}={node.minor(address)}" for address in (addresses[0], others[0])]
    tried = node.python("two", "main", "make_device.py", *pairs).split()
    assert [int(each) for each in tried[1::2]] == [errno.EBUSY, errno.EPERM]


def test_a_pod_that_asks_for_more_than_there_is_is_refused(node: KubeletNode) -> None:
    """By the kubelet's admission; what the scheduler does with such a pod needs a scheduler."""
    node.resources(f"{CY}=4")
    node.apply(workload("many", {CY: 5}))
    reason, message = node.until_refused("many")
    assert reason == "UnexpectedAdmissionError"
    assert f"unavailable for {CY}. Requested: 5, Available: 4" in message
    assert "many-node" not in node.resources()["pods"]


@pytest.mark.parametrize(("name", "uid", "label"), [("helper", 0, "unconfined"), ("server", 65532, "(enforce)")])
def test_a_process_is_what_the_manifest_promises(node: KubeletNode, name: str, uid: int, label: str) -> None:
    pid = node.pid("qat-plugin", name)
    status = dict(re.findall(r"^(\w+):\s*(.*)$", node.guest.run(f"cat /proc/{pid}/status"), re.MULTILINE))
    assert status["Uid"].split() == [str(uid)] * 4
    assert status["Gid"].split() == ["65532"] * 4
    assert status["Groups"].split() in ([], ["65532"])
    assert {status[key] for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert label in node.guest.run(f"cat /proc/{pid}/attr/current")
    assert "docker-default" not in node.guest.run(f"cat /proc/{pid}/attr/current")
    # Its mounts are those of the manifest, as writable as that says, and the runtime's.
    mounts = rendered.container(rendered.pod_spec(rendered.render("base")), name)["volumeMounts"]
    wanted = {each["mountPath"]: not each.get("readOnly", False) for each in mounts}
    found = {}
    for line in node.guest.run(f"cat /proc/{pid}/mountinfo").splitlines():
        words = line.split()
        found[words[4]] = words[5].split(",")[0] == "rw"
    assert {path: found.get(path) for path in wanted} == wanted
    outside = {path for path in found if path not in wanted and not path.startswith(("/proc/", "/sys/"))}
    assert outside <= _RUNTIMES
    assert not found["/"]
    assert not found["/sys"]
    writable = {path for path, write in found.items() if write and path.startswith("/sys")}
    assert writable == ({"/sys/bus/pci", "/sys/devices"} if name == "helper" else set())


def test_nothing_that_is_the_helpers_can_be_written_by_the_server(node: KubeletNode) -> None:
    said = node.python("qat-plugin", "server", "refused.py").splitlines()
    assert [line for line in said if line.startswith("DONE")] == []
    assert len(said) == 27, said
    assert said[-1] == "mine 0o770 0 65532"


def test_metrics_status_and_doctor(node: KubeletNode) -> None:
    node.resources(f"{CY}=4")
    address = node.pods()["qat-plugin"]["status"]["podIP"]
    node.apply(workload("scraper", {CY: 1}))
    holder = node.client("scraper")["environment"]["QAT0"]
    program = (
        f"import urllib.request as u; print(u.urlopen('http://{address}:9090/metrics', timeout=60).read().decode())"
    )

    def scraped() -> str:
        """From another pod, as Prometheus does."""
        text = node.execute("scraper", "main", "python3", "-c", program)
        return text if 'qat_plugin_devices{health="healthy",resource="cy"} 4.0' in text else ""

    metrics = node.guest.wait("all is healthy in the metrics", scraped)
    assert "qat_plugin_ready 1.0" in metrics
    assert 'qat_plugin_registered{resource="cy"} 1.0' in metrics
    assert "qat_plugin_helper_up 1.0" in metrics
    # As `kubectl exec` does, and as root on the node.
    for status in (
        node.execute("qat-plugin", "server", "qat-plugin", "status"),
        node.guest.run(f"{PYTHON} -m qat_server.main status"),
    ):
        assert "ready" in status.splitlines()[0]
        assert holder in status
    for doctor in (
        node.execute("qat-plugin", "server", "qat-plugin", "doctor"),
        node.guest.run(f"{PYTHON} -m qat_server.main doctor", check=False),
    ):
        assert "4 VFs bound to vfio-pci" in doctor
        assert "AppArmor is on" in doctor


def test_the_minimal_example_shows_what_its_page_says(node: KubeletNode) -> None:
    node.resources(f"{CY}=4")
    (pod,) = rendered.render("examples/minimal")
    node.apply({**pod, "metadata": {"namespace": "default", **pod["metadata"]}})

    def ended(pods: dict[str, Any]) -> Any:
        return pods.get("qat-minimal", {}).get("status", {}).get("phase") in ("Succeeded", "Failed")

    node.until("the example has ended", ended)
    said = node.log("qat-minimal", "main")
    addresses = re.findall(r"^QAT[01]=(\S+)$", said, re.MULTILINE)
    assert len(addresses) == 2, said
    assert set(said.split()[2:]) == {"/dev/vfio/vfio", *(f"/dev/vfio/{node.group(each)}" for each in addresses)}
