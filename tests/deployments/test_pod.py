"""The demo's steps, done by both images as the users that they declare, as the manifest's pod, on a simulated node."""

import io
import json
import re
from pathlib import Path
from typing import Final

import pytest
from rich.console import Console

from deployments import containers, images, measured, rendered
from deployments.pods import PodNode, pod_node
from qat_server.kubelet.allocation import AllocationPolicy
from qat_simulation.demo.audit import show_audit
from qat_simulation.demo.demo_run import DemoRun
from qat_simulation.demo.events import allocate, heartbeat, restart_kubelet
from qat_simulation.demo.startup import bind, register, start
from qat_simulation.kubelet.config_map import ConfigMap
from qat_simulation.node.description import Node, demo_node, parse_node

pytestmark = [
    pytest.mark.usefixtures("kustomize"),
    pytest.mark.skipif(bool(images.why_not()), reason=images.why_not()),
    pytest.mark.skipif(bool(containers.why_not()), reason=containers.why_not()),
]


# The base serves the default VF drivers, and makes no VFs.
NODE: Final = Node(pfs=tuple(pf for pf in demo_node().pfs if pf.device == "4940" and pf.num_vfs != 0))


async def _demo(node: PodNode) -> str:
    """The demo's own steps on this node; what they print."""
    shown = io.StringIO()
    config = ConfigMap(node.directory / "config")  # that nobody reads: the base does not provision
    demo = DemoRun(Console(file=shown, width=120), NODE, node, config, AllocationPolicy.NONE)
    await start(demo)
    await bind(demo)
    await register(demo)
    await allocate(demo)
    await heartbeat(demo)
    await restart_kubelet(demo)
    show_audit(demo)
    assert demo.failures == []
    return shown.getvalue()


def _status(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/status").read_text()
    return {key: value.strip() for key, value in re.findall(r"^(\w+):(.*)$", text, re.MULTILINE)}


async def test_the_demo_by_the_images_as_the_base_says() -> None:
    async with pod_node(NODE, rendered.render("base")) as node:
        shown = await _demo(node)
        assert "the chain of hashes is intact" in shown
        helper, server = (_status(node.made[name].pid) for name in ("helper", "server"))
        assert (helper["Uid"].split(), helper["Gid"].split(), helper["Groups"]) == (["0"] * 4, ["65532"] * 4, "")
        assert (server["Uid"].split(), server["Gid"].split(), server["Groups"]) == (["65532"] * 4, ["65532"] * 4, "")
        for process in (helper, server):
            assert {process[key] for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
            assert (process["NoNewPrivs"], process["Seccomp"]) == ("1", "2")
        for name in ("helper", "server"):
            limit = node.made[name].configuration()["linux"]["resources"]["memory"]["limit"]
            peak = node.made[name].peak_memory()
            assert peak is None or peak < limit * 3 / 4
            if peak is not None:
                measured.note(
                    f"{name}'s container during the demo: at most {peak / 2**20:.0f} MiB of its {limit >> 20} MiB"
                )
        # As kubectl exec: the image's own client sees the same.
        answer = node.made["server"].run_inside("qat-plugin", "status")
        assert answer.returncode == 0, answer.stderr
        assert "0000:6b:00.1" in answer.stdout
        assert (await node.get("/status"))[0] == 404, "the network does not see it"


async def test_the_demo_by_the_images_as_hardened_says() -> None:
    """The project's seccomp profiles, the policy file; AppArmor is not of every kernel."""
    async with pod_node(NODE, rendered.render("overlays/hardened")) as node:
        assert "the chain of hashes is intact" in await _demo(node)
        assert {json.loads(line).get("operation") for line in node.audit_log.read_bytes().splitlines()} & {
            "OpenPodResources",
            "PrepareSocketDirectory",
            "RegisterResource",
        } == {"PrepareSocketDirectory", "OpenPodResources", "RegisterResource"}
        assert node.kubelet.registrations[0].error == ""
        assert not (node.kubelet_directory / "plugins_registry/qat.intel.com").exists()


async def test_pfs_without_vfs_are_provisioned_as_the_overlay_says() -> None:
    """From the ConfigMap's qat.conf, by the same two containers, to resources that a pod can ask for."""
    described = b'{"pfs": [{"address": "0000:6b:00.0", "services": "dc", "num_vfs": 0, "total_vfs": 4}]}'
    async with pod_node(parse_node(described), rendered.render("overlays/qat_initcontainer")) as node:
        node.start_helper()
        node.start_server()
        wanted = {"qat.intel.com/cy": 4}
        await node.until("the PF's VFs are allocatable", lambda: node.kubelet.allocatable() == wanted)
        assert (node.kernel.sysfs_root / "bus/pci/devices/0000:6b:00.0/qat/cfg_services").read_text() != "dc\n"


async def test_what_the_server_may_not_do_in_its_container() -> None:
    """Each of these is the helper's, is in the image's or the manifest's way, or is not there at all."""
    program = """
import os, socket, sys
def refused(action, *arguments):
    try: action(*arguments)
    except OSError as error: print(action.__name__, *arguments[:1], error.errno)
    else: print("DONE", action.__name__, *arguments)
def write(path): os.close(os.open(path, os.O_WRONLY))
def create(path): os.close(os.open(path, os.O_WRONLY | os.O_CREAT))
def connect(path): socket.socket(socket.AF_UNIX).connect(path)
device = "/sys/bus/pci/devices/0000:6b:00.1/"
for name in ("driver_override", "enable"): refused(write, device + name)
refused(write, "/sys/bus/pci/drivers_probe")
refused(write, "/sys/bus/pci/devices/0000:6b:00.0/sriov_numvfs")
refused(os.listdir, "/sys/kernel/debug")
refused(create, "/etc/x"); refused(create, "/x"); refused(create, "/opt/qat-plugin/server/x"); refused(create, "/sys/x")
refused(create, "/run/qat-plugin/x"); refused(os.unlink, "/run/qat-plugin/helper.sock")
refused(connect, "/var/lib/kubelet/device-plugins/kubelet.sock")
refused(os.listdir, "/var/log/qat-plugin")
refused(os.setuid, 0); refused(os.chroot, "/"); refused(os.mknod, "/dev/x")
refused(os.execv, "/bin/sh", ["sh"])
print("socket", oct(os.stat("/run/qat-plugin/helper.sock").st_mode), os.stat("/run/qat-plugin/helper.sock").st_gid)
print("mine", oct(os.stat("/var/lib/kubelet/device-plugins/qat.intel.com").st_mode & 0o7777))
"""
    async with pod_node(NODE, rendered.render("base")) as node:
        node.start_helper()
        node.start_server()
        await node.until_status("the server is ready", lambda status: status.ready)
        answer = node.made["server"].run_inside("python3", "-c", program)
        assert answer.returncode == 0, answer.stderr
        assert "DONE" not in answer.stdout
        assert answer.stdout.count("\n") == 19
        assert "mine 0o770" in answer.stdout
        assert "socket 0o140660 65532" in answer.stdout
        # Nor can it see the helper, whose processes are in another namespace.
        seen = node.made["server"].run_inside(
            "python3", "-c", "import os; print(*sorted(filter(str.isdigit, os.listdir('/proc'))))"
        )
        assert len(seen.stdout.split()) == 2
