"""The node is switched off and on with all that was on its disk: what the DaemonSet's pod and the units make of it.

PFs come up as their driver makes them, without VFs: so the plugin provisions here, as docs/provisioning.md says.
"""

import re
import time

import pytest

from cluster import installation
from cluster.disk import committed
from cluster.installation import Installation
from cluster.node import KubeletNode
from cluster.static_pod import workload
from deployments import rendered
from deployments.rendered import DEPLOYMENTS, Manifest
from kernel.machine import PROJECT
from kubelet.nodes import CY
from qat_simulation.node.description import Node, Pf

AS_BOOTED = Node(pfs=(Pf(address="0000:6b:00.0", services="sym;asym", total_vfs=2, num_vfs=0),))
_DEVICES = "0000:6b:8086:4940:2:-1"
_CUT = "sync; systemctl reboot --force --force"
"""No shutdown in order: what was running is just gone."""


def _bare() -> Manifest:
    pod = workload("bare", {CY: 2})
    pod["spec"]["restartPolicy"] = "Always"
    return pod


def _reboot(node: KubeletNode) -> None:
    node.guest.run(
        "echo vfio-pci >/etc/modules-load.d/qat.conf; echo fake_qat >>/etc/modules-load.d/qat.conf;"
        f"echo 'options fake_qat devices={_DEVICES}' >/etc/modprobe.d/fake_qat.conf"
    )
    installation.lines.append(f"a reboot, until the guest takes commands: {node.guest.reboot(_CUT):.1f} s")
    node.until_healthy()


def _end(installed: Installation) -> None:
    """Leave a node as other tests know it."""
    guest = installed.node.guest
    guest.run("systemctl disable --now qat-plugin.service qat-helper.service qat-helper.socket 2>&1", check=False)
    guest.run("rm -f /etc/modules-load.d/qat.conf /etc/modprobe.d/fake_qat.conf")
    installed.clear()


def test_with_the_daemonset_a_bare_pod_is_admitted_before_the_plugin_is_there(
    installed: Installation, node: KubeletNode
) -> None:
    """What docs/troubleshooting.md says of it, for a pod that nothing makes anew."""
    try:
        installed.plugin(AS_BOOTED, rendered.render("overlays/qat_initcontainer"))
        node.resources(f"{CY}=2")
        node.apply(_bare())
        assert len(node.client("bare")["devices"]) == 2
        _reboot(node)
        began = time.monotonic()
        reason, message = node.until_refused("bare")
        assert reason == "UnexpectedAdmissionError"
        assert CY in message
        # The plugin itself comes back, and makes the VFs again; new pods are served.
        node.until_ready("qat-plugin")
        node.resources(f"{CY}=2")
        installation.lines.append(f"... with the DaemonSet's pod, to two allocatable: {time.monotonic() - began:.1f} s")
        again = _bare()
        again["metadata"]["name"] = "again"
        node.apply(again)
        assert len(node.client("again")["devices"]) == 2
    finally:
        _end(installed)


def _commands() -> str:
    """What deployments/README.md has for systemd, word for word."""
    text = (DEPLOYMENTS / "README.md").read_text()
    found = re.search(r"```\n(.*?)```", text[text.index("## Without a cluster's help: systemd") :], re.DOTALL)
    assert found is not None
    return found[1]


def _provisioning_command() -> str:
    """What it has for the policy of a server that provisions."""
    (found,) = re.findall(
        r"^install -m 0644 -t /etc/qat-plugin/policy .*$", (DEPLOYMENTS / "README.md").read_text(), re.M
    )
    return str(found)


def _confined(node: KubeletNode) -> None:
    """Started anew under the project's profiles, while a pod has the VFs: the server still reaches systemd."""
    run = node.guest.run
    run(f"set -e; cd {PROJECT}; apparmor_parser --replace apparmor/qat-helper apparmor/qat-server; dmesg --clear")
    run("systemctl restart qat-helper.service qat-plugin.service")
    for name in ("helper", "plugin"):
        label = run(f"cat /proc/$(systemctl show --value -p MainPID qat-{name})/attr/current").strip("\0\n")
        assert label == f"qat-{'server' if name == 'plugin' else name} (enforce)"
    assert run("systemctl show --value -p StatusText qat-plugin").strip() == f"started with 2 {CY}"
    assert run("dmesg | grep 'apparmor=\"DENIED\"' | grep 'profile=\"qat-'", check=False) == ""
    assert len(node.resources(f"{CY}=2")["pods"]["bare-node"]["main"][CY]) == 2


def _race(node: KubeletNode) -> None:
    """What the log of the kubelet's last start says of when it listened for plugins, had the list, and took the pod."""
    lines = (node.guest.share / "kubelet.log").read_text(errors="replace").splitlines()
    listening = "Starting device plugin registration server"
    last = lines[max(number for number, line in enumerate(lines) if listening in line) :]
    listed = next(line for line in last if "Processed device updates for resource" in line)
    took = next(line for line in last if "SyncLoop ADD" in line and "default/bare-node" in line)
    known, asked = (_seconds(line) - _seconds(last[0]) for line in (listed, took))
    installation.lines.append(f"... the kubelet listens, has the list in {known:.3f} s, takes pods in {asked:.3f} s")


def _seconds(line: str) -> float:
    """The time of one of klog's lines, within its day."""
    hours, minutes, seconds = line.split()[1].split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


@pytest.mark.skipif(
    not committed(), reason="needs the project's repository: docs/by-hand.md installs what is committed"
)
def test_with_the_units_the_plugin_is_there_first_and_a_bare_pod_gets_its_devices(
    installed: Installation, node: KubeletNode
) -> None:
    try:
        installed.devices(AS_BOOTED)
        node.guest.run(
            "mkdir -p /etc/qat-plugin; echo 'ServicesEnabled=sym;asym' >/etc/qat-plugin/qat.conf;"
            "echo QAT_PLUGIN_PROVISIONING_CONFIG=/etc/qat-plugin >/etc/qat-plugin/server.env;"
            f"cd {PROJECT}; install -d /etc/qat-plugin/policy; {_provisioning_command()}"
        )
        commands = _commands()
        assert "systemctl enable --now" in commands
        node.guest.run(f"set -e; cd {PROJECT}; {commands}")
        node.resources(f"{CY}=2")
        node.apply(_bare())
        assert len(node.client("bare")["devices"]) == 2
        _confined(node)
        _reboot(node)
        began = time.monotonic()
        assert len(node.client("bare")["devices"]) == 2
        installation.lines.append(f"... with the units, to the pod with its devices: {time.monotonic() - began:.1f} s")
        _race(node)
        assert len(node.resources(f"{CY}=2")["pods"]["bare-node"]["main"][CY]) == 2
        assert "ready" in node.guest.run("/opt/qat-plugin/server/bin/qat-plugin status").splitlines()[0]
    finally:
        _end(installed)
