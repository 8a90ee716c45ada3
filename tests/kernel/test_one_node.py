"""What leaves a node as it was, all on one, since each start takes its time: who may do what, said by the kernel (the
helper has uid 0 and nothing else, the server has nothing at all); DPDK's own driver; a VF that is bound again.
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from kernel.nodes import PF, SMALL, VF
from kernel.real_node import InContainer, RealNode, real_node
from kubelet.nodes import CY
from qat_shared.messages import DeviceConfig, Heartbeat, ReadDeviceConfig, ReadHeartbeat
from qat_shared.pci import PciAddress

# Each is done in the server's own namespaces and with its identity; it prints what was not refused.
ATTEMPTS = """
import os, socket
pci, pf, vf, group, kubelet = {pci!r}, {pf!r}, {vf!r}, {group!r}, {kubelet!r}
def read(path): return lambda: open(path, "rb").read(1)
def write(path, data): return lambda: os.write(os.open(path, os.O_WRONLY), data)
def connect(path):
    return lambda: socket.socket(socket.AF_UNIX).connect(path)
attempts = dict(
    heartbeat=read(f"/sys/kernel/debug/qat_4xxx_{{pf}}/heartbeat/status"),
    debugfs=lambda: os.listdir("/sys/kernel/debug"),
    override=write(f"{{pci}}/devices/{{vf}}/driver_override", b"vfio-pci"),
    unbind=write(f"{{pci}}/drivers/vfio-pci/unbind", vf.encode()),
    probe=write(f"{{pci}}/drivers_probe", vf.encode()),
    numvfs=write(f"{{pci}}/devices/{{pf}}/sriov_numvfs", b"0"),
    state=write(f"{{pci}}/devices/{{pf}}/qat/state", b"down"),
    services=write(f"{{pci}}/devices/{{pf}}/qat/cfg_services", b"dc"),
    remove=write(f"{{pci}}/devices/{{vf}}/remove", b"1"),
    rescan=write(f"{{pci}}/rescan", b"1"),
    vfio=lambda: os.open(group, os.O_RDWR),
    kubelet=connect(f"{{kubelet}}/device-plugins/kubelet.sock"),
    setuid=lambda: os.setuid(0),
    chown=lambda: os.chown("/tmp", 65532, 65532),
)
for name, attempt in attempts.items():
    try:
        attempt()
    except OSError as error:
        assert error.errno in (1, 2, 13, 30), (name, error)
    else:
        print(name)
"""


def status_of(pid: int) -> dict[str, str]:
    """What /proc says of a process's identity."""
    lines = (line.partition(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: value for name, _, value in lines}


DPDK = ("dpdk-test-crypto-perf", "--no-huge", "-m", "256", "--no-telemetry", "--no-shconf", "-l", "0,1")
DPDK_RUN = (
    *("--vdev", "crypto_openssl", "--", "--ptest", "throughput", "--devtype", "crypto_openssl", "--optype"),
    *("cipher-only", "--cipher-algo", "aes-cbc", "--cipher-op", "encrypt", "--cipher-key-sz", "16"),
    *("--cipher-iv-sz", "16", "--total-ops", "64", "--burst-sz", "16", "--buffer-sz", "64"),
)


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def running() -> AsyncIterator[RealNode]:
    async with real_node(SMALL) as started:
        await started.start({CY: 4})
        yield started


@pytest_asyncio.fixture(loop_scope="module")
async def node(running: RealNode) -> RealNode:
    """All VFs are bound and healthy, and nobody has one, whatever the test before has done."""
    running.real.set_heartbeat(PF, 0)
    for each in await running.kubelet.pods():
        await running.kubelet.free(each.pod)
    await running.wait({CY: 4})
    await running.until_bound()
    return running


async def test_identities_and_what_the_server_is_refused(node: RealNode) -> None:
    status = await node.status()
    assert node.helper is not None
    assert node.server is not None
    for pid, uid in ((node.helper.pid, "0"), (node.server.pid, "65532")):
        said = status_of(pid)
        assert set(said["Uid"].split()) == {uid}
        assert set(said["Gid"].split()) == {"65532"}
        assert {int(said[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
        assert said["NoNewPrivs"] == "1"
    group = Path(f"/sys/bus/pci/devices/{VF}/iommu_group").readlink().name
    facts = {
        "pci": "/sys/bus/pci",
        "pf": PF,
        "vf": VF,
        "group": f"/dev/vfio/{group}",
        "kubelet": os.fspath(node.kubelet_directory),
    }
    identity = ["setpriv", "--reuid=65532", "--regid=65532", "--clear-groups", "--bounding-set=-all"]
    program = [sys.executable, "-I", "-c", ATTEMPTS.format(**facts)]
    enter = ["nsenter", f"--target={node.server.pid}", "--mount", "--", *identity, "--no-new-privs", "--"]
    done = await asyncio.to_thread(subprocess.run, [*enter, *program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (await node.status()).vfs == status.vfs, "nothing has changed"


async def test_the_heartbeat_comes_from_debugfs_through_the_helper(node: RealNode) -> None:
    path = Path(f"/sys/kernel/debug/qat_4xxx_{PF}/heartbeat")
    address = PciAddress.parse(PF)
    with node.ask() as client:
        before = int((path / "queries_sent").read_text())
        reply = client.ask(ReadHeartbeat(id=1, address=address))
        assert isinstance(reply, Heartbeat)
        assert reply.alive
        assert int((path / "queries_sent").read_text()) > before
        node.real.set_heartbeat(PF, -1)
        reply = client.ask(ReadHeartbeat(id=2, address=address))
        assert isinstance(reply, Heartbeat)
        assert not reply.alive
        config = client.ask(ReadDeviceConfig(id=3, address=address))
        assert isinstance(config, DeviceConfig)
        assert "ServicesEnabled = sym;asym\n" in config.text


async def test_dpdks_own_driver_finds_the_vf_that_it_was_given(node: RealNode) -> None:
    main = (await node.kubelet.allocate("pod", [("main", CY, 1)])).containers["main"]
    address = main.envs["QAT0"]
    dpdk = InContainer(main, *DPDK, "-a", address, "--log-level=*:debug", *DPDK_RUN)
    out, err = await asyncio.to_thread(dpdk.process.communicate)
    said = (out + err).decode(errors="replace")
    short = address.removeprefix("0000:")
    assert f"Found QAT device at {short}" in said, said[-4000:]
    assert "VFIO support initialized" in said
    # The module's VFs have no BARs: the driver gets that far, and the run goes on with the software device.
    assert "QAT cannot get access to VF misc bar" in said, said[-4000:]
    assert "Throughput" in said or "MOps" in said, said[-4000:]
    assert dpdk.process.returncode == 0, said[-4000:]


async def test_a_vf_unbound_by_hand_is_bound_again(node: RealNode) -> None:
    node.real.unbind(VF)
    node.real.set_driver_override(VF, None)
    node.real.probe(VF)
    await node.until("it is back on vfio-pci", lambda: node.real.driver(VF) == "vfio-pci")
    await node.wait({CY: 4})
