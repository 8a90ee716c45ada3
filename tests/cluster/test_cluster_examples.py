"""The examples in a cluster, as far as fake devices carry them: DPDK opens the VFs that its pod was given by VFIO, with
hugepages and all that the manifest asks of the node; the work itself is done by its software drivers, named as in the
examples' README, since the fake devices have no engine. QATlib opens and resets its two, and OpenSSL computes alone."""

import re
from typing import Any, Final

import pytest

from cluster.cluster_node import Cluster, step
from cluster.cluster_nodes import BOTH
from deployments import rendered
from deployments.software_driver import software_driver

_PFS: Final = {"crypto": BOTH.pfs[0], "compress": BOTH.pfs[1]}
_TABLE: Final = re.compile(r"^\s*\d+\s+\d+(\s+[\d.]+){4}", re.MULTILINE)


def _ended(cluster: Cluster, pod: str) -> tuple[str, str]:
    """Wait until a pod has ended: its phase, and what it printed."""

    def phase() -> str:
        found = str(cluster.get(f"pod {pod}")["status"]["phase"])
        return found if found in ("Succeeded", "Failed") else ""

    return cluster.wait(f"{pod} has ended", phase), cluster.run(f"kubectl logs {pod}")


def test_minimal_shows_what_its_page_says(cluster: Cluster) -> None:
    cluster.install(BOTH)
    cluster.until_allocatable(cy=4, dc=4)
    cluster.run("kubectl apply -k deployments/examples/minimal")
    phase, said = _ended(cluster, "qat-minimal")
    assert phase == "Succeeded", said
    addresses = re.findall(r"^QAT[01]=(\S+)$", said, re.MULTILINE)
    assert len(addresses) == 2, said
    assert set(said.split()[2:]) == {"/dev/vfio/vfio", *(f"/dev/vfio/{cluster.node.group(each)}" for each in addresses)}


@pytest.mark.parametrize("kind", _PFS)
def test_dpdk_opens_its_vfs_and_works_on_the_software_driver(cluster: Cluster, kind: str) -> None:
    cluster.install(BOTH)
    cluster.until_allocatable(cy=4, dc=4)
    (pod,) = rendered.render(f"examples/dpdk/{kind}-perf")
    container: dict[str, Any] = pod["spec"]["containers"][0]
    driver = software_driver(kind)["DEVICE_TYPE"]
    values = {each["name"]: each["value"] for each in container["env"]}
    values |= {"DEVICE_TYPE": driver, "EAL_OPTIONS": f"{values['EAL_OPTIONS']} --vdev={driver} --log-level=*:debug"}
    container["env"] = [{"name": name, "value": value} for name, value in values.items()]
    container["resources"]["limits"]["cpu"] = "1"  # of the guest's two, and less work for that
    container["command"][-1] = re.sub(r"(--total-ops \d{5})0+|(--num-iter \d)0+", r"\1\2", container["command"][-1])
    with step(f"DPDK's {kind} example applied, until it has ended"):
        cluster.apply(pod)
        phase, said = _ended(cluster, pod["metadata"]["name"])
    assert phase == "Succeeded", said[-4000:]
    # The two VFs that it may have, and no other, by VFIO; no further than that, since the fake ones have no BARs.
    found = set(re.findall(r"Found QAT device at (\S+)", said))
    pf = _PFS[kind].address.removeprefix("0000:")
    assert len(found) == 2, said[-4000:]
    assert all(address.startswith(pf.removesuffix("00.0")) for address in found), found
    assert "VFIO support initialized" in said
    assert "QAT cannot get access to VF misc bar" in said
    # The work, by the software driver, which the output names.
    assert driver in said
    assert _TABLE.search(said), said[-4000:]


def test_qatlib_opens_both_of_its_vfs_and_openssl_works_without(cluster: Cluster) -> None:
    cluster.install(BOTH)
    cluster.until_allocatable(cy=4, dc=4)
    (pod,) = rendered.render("examples/openssl")
    container: dict[str, Any] = pod["spec"]["containers"][0]
    (measured,) = [each for each in container["env"] if each["name"] == "SPEED"]
    measured["value"] = "-testmode rsa1024"  # each operation once, and keys that are quickly made
    container["resources"]["limits"]["cpu"] = "1"
    # Before all, a VF more than it has: QATlib says how many it found.
    container["command"][-1] = f"QAT_POLICY=3 openssl engine -pre INIT_ENGINE qatengine; {container['command'][-1]}"
    with step("OpenSSL's example applied, until it has ended"):
        cluster.apply(pod)
        phase, said = _ended(cluster, pod["metadata"]["name"])
    assert phase == "Failed", said[-4000:]  # as it must where all was computed in software
    assert said.count("Policy 3 is incompatible with the number of available devices 2") == 1, said[-4000:]
    # By VFIO, through group, container and reset (nothing of that fails), up to the rings in a BAR that is not there:
    # each VF, by the check and by the second measurement.
    assert "VFIO" not in said, said[-4000:]
    assert said.count("Failed to initialise all service instances") == 4, said[-4000:]
    assert "[Failure]: SET_INSTANCE_FOR_THREAD:0" in said, said[-4000:]
    assert len(re.findall(r"\d 1024 bits private RSA sign ops in ", said)) == 2, said[-4000:]
    assert "both in software: QATlib has no instance that works; its lines above say why" in said, said[-4000:]
