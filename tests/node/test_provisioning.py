"""Provisioning by the real server and helper on a simulated node, whose kernel behaves like the QAT driver."""

import errno
import hashlib
import json
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from qat_server.observability.status_format import ProvisioningStatus, Status
from qat_simulation.kubelet.config_map import ConfigMap
from qat_simulation.node.description import Node, Pf
from qat_simulation.running_node import RunningNode, running_node

CY, DC, SYM_DC, GENERIC = (f"qat.intel.com/{name}" for name in ("cy", "dc", "sym-dc", "generic"))
PF0, PF1, PF2 = "0000:6b:00.0", "0001:6b:00.0", "0000:e8:00.0"
CRYPTO, COMPRESSION = {"qat.conf": "ServicesEnabled=sym;asym\n"}, {"qat.conf": "ServicesEnabled = dc\n"}


def bare(*addresses: str, **more: Any) -> Node:
    """PFs as after boot: the driver's default services, and no VFs."""
    return Node(pfs=tuple(Pf(address=each, services="sym;asym", total_vfs=4, num_vfs=0, **more) for each in addresses))


@asynccontextmanager
async def provisioned(
    node: Node, files: dict[str, str], options: Sequence[str] = ()
) -> AsyncIterator[tuple[RunningNode, ConfigMap]]:
    """Both processes started, with a ConfigMap."""
    async with running_node(node) as running:
        config = ConfigMap(running.directory / "config")
        config.write(files)
        running.add_server_options(f"--provisioning-config={config.directory}", "--resync-interval=1h", *options)
        running.start_helper()
        running.start_server()
        yield running, config
        assert running.kernel.defects == []


async def serves(node: RunningNode, allocatable: dict[str, int], seconds: float = 120) -> None:
    """Wait until this is allocatable, apart from resources that are being withdrawn (0)."""
    await node.until(
        f"allocatable is {allocatable}",
        lambda: {name: n for name, n in node.kubelet.allocatable().items() if n} == allocatable,
        seconds,
    )


def of(status: Status, pf: str = PF0) -> ProvisioningStatus:
    return next((each for each in status.provisioning if each.pf == pf), ProvisioningStatus(pf, "", "", (), (), ""))


def read(node: RunningNode, name: str, pf: str = PF0) -> str:
    return (node.kernel.sysfs_root / "bus/pci/devices" / pf / name).read_text().strip()


def story(node: RunningNode, pf: str = PF0) -> list[tuple[Any, ...]]:
    """The operations on a PF that have ended, from the audit log, in order, with what they changed."""
    ended = []
    for line in map(json.loads, node.audit_lines()):
        about = line.get("arguments", {}).get("address") == pf and line["operation"].startswith("Set")
        if about and line["event"] in ("done", "late", "refused"):
            result = line["result"]
            ended.append((line["operation"], line["verdict"], result.get("before"), result.get("now")))
    return ended


async def test_bare_pfs_in_two_domains_become_resources() -> None:
    files = CRYPTO | {"qat.toml": f"[[rules]]\naddress = '{PF1}'\nservices = 'dc'\nauto_reset = true\n"}
    async with provisioned(bare(PF0, PF1), files) as (node, _):
        await serves(node, {CY: 4, DC: 4})
        status = await node.until_status("ready", lambda status: status.ready)
        assert [(each.pf, each.stage) for each in status.provisioning] == [(PF0, "done"), (PF1, "done")]
        assert story(node) == [("SetNumVfs", "ok", "0", "4")]
        assert story(node, PF1) == [
            ("SetAutoReset", "ok", "off", "on"),
            ("SetServices", "ok", "sym;asym", "dc"),
            ("SetNumVfs", "ok", "0", "4"),
        ]


async def test_a_configmap_swap_changes_allocatable_without_a_resync() -> None:
    async with provisioned(bare(PF0, PF1), CRYPTO) as (node, config):
        await serves(node, {CY: 8})
        began = time.monotonic()
        config.write(COMPRESSION)
        await serves(node, {DC: 8})
        took = time.monotonic() - began
        print(f"ConfigMap swap to new allocatable: {took * 1000:.0f} ms")
        assert node.kubelet.allocatable()[CY] == 0, "the old resource is at 0 until it is withdrawn"
        assert story(node)[1:] == [("SetServices", "ok", "sym;asym", "dc"), ("SetNumVfs", "ok", "0", "4")]
        await node.until(
            "cy is withdrawn", lambda: not list(node.kubelet.directory.glob("device-plugins/*/cy.sock")), 30
        )
        assert node.log("server").count("resource withdrawn") == 1
        config.write({"qat.conf": "ServicesEnabled=dc ; sym # both\n"})
        await serves(node, {SYM_DC: 8})


async def test_files_that_are_edited_in_place_are_detected_too() -> None:
    async with provisioned(bare(PF0), {}) as (node, config):
        await serves(node, {CY: 4})
        for name in list(config.directory.iterdir()):
            if name.is_symlink():
                name.unlink()
        (config.directory / "qat.conf").write_text("ServicesEnabled=dc\n")
        await serves(node, {DC: 4})
        (config.directory / "qat.conf").write_text("ServicesEnabled=sym;asym\n")
        await serves(node, {CY: 4})


async def test_an_invalid_configuration_leaves_the_last_valid_one_in_force() -> None:
    async with provisioned(bare(PF0), {"qat.conf": "ServicesEnabled=magic\n"}) as (node, config):
        status = await node.until_status("it is reported", lambda status: status.provisioning_error)
        assert "qat.conf line 1: ServicesEnabled: unknown service 'magic'" in status.provisioning_error
        assert any("no provisioning configuration" in reason for reason in status.not_ready)
        config.write(COMPRESSION)
        await serves(node, {DC: 4})
        config.write({"qat.toml": "[defaults]\nvfs = 'some'\n"})
        status = await node.until_status("it is reported", lambda status: status.provisioning_error)
        assert status.ready
        _, metrics = await node.get("/metrics")
        assert b"qat_plugin_provisioning_configuration_error 1.0" in metrics
        assert node.kubelet.allocatable() == {DC: 4}
        config.write(CRYPTO)
        await serves(node, {CY: 4})
        assert (await node.status()).provisioning_error == ""


async def test_a_node_has_its_own_file() -> None:
    async with running_node(bare(PF0)) as node:
        config = ConfigMap(node.directory / "config")
        config.write(CRYPTO | {"qat-this.node.conf": "ServicesEnabled=dc\n", "qat-other.conf": "ServicesEnabled=sym\n"})
        node.add_server_options(f"--provisioning-config={config.directory}", "--node-name=this.node")
        node.start_helper()
        node.start_server()
        await serves(node, {DC: 4})


async def test_a_pf_in_use_waits_and_is_changed_as_soon_as_it_is_free() -> None:
    async with provisioned(bare(PF0, PF1), CRYPTO) as (node, config):
        await serves(node, {CY: 8})
        pod = await node.kubelet.allocate("crypto", [("main", CY, 1)])
        vf = pod.containers["main"].envs["QAT0"]
        assert vf.startswith("0000:6b")
        opened = node.kernel.open_vfio(vf)
        config.write(COMPRESSION)
        await serves(node, {CY: 4, DC: 4})  # the other PF does not wait
        status = await node.until_status("it waits", lambda status: of(status).stage == "waiting")
        assert of(status).held_by == ("default/crypto/main",)
        assert of(status).steps == ("services dc", "4 VFs")
        assert status.ready
        _, metrics = await node.get("/metrics")
        assert f'qat_plugin_provisioning_held{{pf="{PF0}"}} 1.0'.encode() in metrics
        assert b'qat_plugin_provisioning_pfs{stage="waiting"} 1.0' in metrics
        logged = [line for line in node.log("server").splitlines() if "waits until" in line]
        assert len(logged) == 1
        assert "default/crypto/main" in logged[0]
        other = await node.kubelet.allocate("other", [("main", CY, 1)])  # its free VFs are given out meanwhile
        node.kubelet.free("other")
        assert other.containers["main"].envs["QAT0"].startswith("0000:6b")
        node.kubelet.free("crypto")  # the pod has gone, but a process has the VF open
        for _ in range(3):
            await node.until_status("it waits", lambda status: of(status).stage == "waiting")
        assert story(node) == [("SetNumVfs", "ok", "0", "4")], "nothing has been changed yet"
        opened.close()
        await serves(node, {DC: 8}, 30)
        assert story(node)[1:] == [("SetServices", "ok", "sym;asym", "dc"), ("SetNumVfs", "ok", "0", "4")]
        assert node.log("server").count("waits until") == 1


async def test_a_drained_pf_gives_no_vf_to_new_pods() -> None:
    async with provisioned(bare(PF0), CRYPTO, ("--drain-for-reconfiguration",)) as (node, config):
        await serves(node, {CY: 4})
        await node.kubelet.allocate("crypto", [("main", CY, 1)])
        config.write(COMPRESSION)
        await node.until("only the pod's is healthy", lambda: node.kubelet.allocatable() == {CY: 1})
        assert node.kubelet.allocatable_free()[CY] == 0
        status = await node.until_status("it waits", lambda status: of(status).stage == "waiting")
        assert [vf.reason for vf in status.vfs] == [
            "",
            *[f"PF {PF0} is being drained: it is provisioned when its other VFs are free"] * 3,
        ]
        config.write(CRYPTO)  # not wanted any more
        await serves(node, {CY: 4})
        config.write(COMPRESSION)
        await node.until("drained again", lambda: node.kubelet.allocatable() == {CY: 1})
        node.kubelet.free("crypto")
        await serves(node, {DC: 4}, 30)


async def test_an_open_vf_that_no_pod_has_is_waited_for_too() -> None:
    async with provisioned(bare(PF0), CRYPTO) as (node, config):
        await serves(node, {CY: 4})
        with node.kernel.open_vfio("0000:6b:00.4"):
            config.write(COMPRESSION)
            await node.until_status("it waits", lambda status: of(status).held_by == ("a process",))
        await serves(node, {DC: 4})


async def test_one_broken_pf_of_eight_leaves_seven_working() -> None:
    addresses = [f"{domain}:{bus}:00.0" for domain in ("0000", "0001") for bus in ("6b", "70", "e8", "ed")]
    async with running_node(bare(*addresses)) as node:
        node.kernel.fail_next(addresses[2], "qat/state", errno.EBUSY, times=1_000_000)
        node.kernel.fail_next(addresses[5], "sriov_numvfs", errno.EIO, times=2)
        config = ConfigMap(node.directory / "config")
        config.write(COMPRESSION)
        node.add_server_options(f"--provisioning-config={config.directory}", "--resync-interval=1h")
        node.start_helper()
        node.start_server()
        await serves(node, {DC: 28})
        status = await node.until_status("it is reported", lambda status: of(status, addresses[2]).stage == "failed")
        assert "Device or resource busy" in of(status, addresses[2]).reason
        assert sum(each.stage == "done" for each in status.provisioning) == 7
        logged = [line for line in node.log("server").splitlines() if addresses[2] in line]
        assert len(logged) == 1, "logged once, although it is retried"


async def test_a_step_that_hangs_delays_no_other_pf_and_is_resumed() -> None:
    async with running_node(bare(PF0, PF1, PF2)) as node:
        node.kernel.hang("qat/state", PF1)
        config = ConfigMap(node.directory / "config")
        config.write(COMPRESSION)
        node.add_server_options(f"--provisioning-config={config.directory}", "--resync-interval=1h")
        node.start_helper()
        node.start_server()
        await serves(node, {DC: 8})
        await node.until_status("it is busy", lambda status: of(status, PF1).stage == "busy", 40)
        await node.until_status("so it stays", lambda status: "an earlier operation" in of(status, PF1).reason)
        assert "did not finish in time" in node.log("server")
        node.kernel.release("qat/state", PF1)
        await serves(node, {DC: 12}, 60)


async def test_services_that_the_kernel_refuses_are_undone_and_not_retried() -> None:
    async with provisioned(bare(PF0, PF1), CRYPTO) as (node, config):
        await serves(node, {CY: 8})
        node.kernel.fail_next(PF0, "qat/cfg_services", errno.EINVAL)
        config.write(COMPRESSION)
        await serves(node, {CY: 4, DC: 4})
        status = await node.until_status("it is reported", lambda status: of(status).stage == "failed")
        assert of(status).reason == "the kernel refused dc; it is not retried until the configuration changes"
        assert story(node)[1:] == [("SetServices", "failed", None, None), ("SetNumVfs", "ok", "0", "4")]
        assert (read(node, "qat/cfg_services"), read(node, "qat/state")) == ("asym;sym", "up")
        config.write({"qat.conf": "ServicesEnabled=dc;sym\n"})
        await serves(node, {SYM_DC: 8})


async def test_unsupported_services_are_reported_before_the_device_goes_down() -> None:
    async with provisioned(bare(PF0), {"qat.conf": "ServicesEnabled=dcc;sym\n"}) as (node, config):
        status = await node.until_status("it is reported", lambda status: of(status).stage == "impossible")
        assert of(status).reason == "sym;dcc (qat.conf line 1): dcc cannot be combined with other services"
        assert story(node) == []
        config.write(CRYPTO)
        await serves(node, {CY: 4})


async def test_every_kind_of_pf_and_every_setting() -> None:
    kinds = ("4940", "4942", "4944", "4946", "4948", "37c8")
    pfs = tuple(
        Pf(
            address=f"0000:{0x10 + n:02x}:00.0",
            device=kind,
            services="sym;asym" if kind != "37c8" else None,
            total_vfs=2,
            num_vfs=0,
        )
        for n, kind in enumerate(kinds)
    )
    toml = "\n".join(
        (
            "heartbeat_interval = 0.05",
            "[defaults]",
            "auto_reset = true",
            "pm_idle_enabled = false",
            "[[rules]]",
            "device_id = '4948'",
            "services = ['sym', 'asym', 'dc']",
            "[[rules]]",
            "address = '0000:11:00.0'",
            "vfs = 0",
        )
    )
    drivers = "--kernel-vf-drivers=4xxxvf,420xxvf,6xxxvf,c6xxvf"
    async with provisioned(Node(pfs=pfs), COMPRESSION | {"qat.toml": toml}, (drivers,)) as (node, config):
        await serves(node, {DC: 6, "qat.intel.com/asym-sym-dc": 2, GENERIC: 2})
        status = await node.until_status(
            "all is done", lambda status: {each.stage for each in status.provisioning} == {"done"}
        )
        assert len(status.provisioning) == 6
        for pf in pfs[:5]:
            assert read(node, "qat/auto_reset", pf.address) == "on"
            assert read(node, "qat/pm_idle_enabled", pf.address) == "0"
            assert read(node, "qat/state", pf.address) == "up"
        assert read(node, "sriov_numvfs", pfs[1].address) == "0"
        assert "the services of a 37c8 cannot be configured" in node.log("server")
        # The heartbeat is queried at the interval of qat.toml, and not at all with 0.
        node.kernel.set_heartbeat(pfs[0].address, -1)
        await serves(node, {DC: 4, "qat.intel.com/asym-sym-dc": 2, GENERIC: 2})
        config.write(COMPRESSION | {"qat.toml": toml.replace("0.05", "0")})
        await serves(node, {DC: 6, "qat.intel.com/asym-sym-dc": 2, GENERIC: 2})


async def test_vfs_do_not_go_through_the_kernels_driver() -> None:
    async with running_node(bare(PF0)) as node:
        before = node.kernel.snapshot()
        assert len(before) == 1
        node.kernel.hang("unbind")  # from 4xxxvf
        config = ConfigMap(node.directory / "config")
        config.write(CRYPTO)
        node.add_server_options(f"--provisioning-config={config.directory}")
        node.start_helper()
        node.start_server()
        await serves(node, {CY: 4})
        assert read(node, "sriov_drivers_autoprobe") == "0"


async def test_a_missing_iommu_is_reported_and_retried() -> None:
    async with provisioned(Node(pfs=bare(PF0).pfs, iommu=False), CRYPTO) as (node, _):
        status = await node.until_status("it is reported", lambda status: of(status).stage == "failed")
        assert "is the IOMMU on" in of(status).reason


async def test_pods_from_before_a_restart_of_the_server_are_waited_for() -> None:
    async with provisioned(bare(PF0), CRYPTO) as (node, config):
        await serves(node, {CY: 4})
        await node.kubelet.allocate("crypto", [("main", CY, 1)])
        await node.stop_server(signal.SIGKILL)
        config.write(COMPRESSION)
        node.start_server()
        await node.until_status("it waits", lambda status: of(status).held_by == ("default/crypto/main",))
        await serves(node, {CY: 4})
        node.kubelet.free("crypto")
        await serves(node, {DC: 4}, 30)


async def test_the_audit_log_is_whole() -> None:
    async with provisioned(bare(PF0), COMPRESSION) as (node, _):
        await serves(node, {DC: 4})
        lines = node.audit_lines()
        for before, after in zip(lines, map(json.loads, lines[1:]), strict=False):
            assert after["previous"] == hashlib.sha256(before).hexdigest()
        reasons = {line["reason"] for line in map(json.loads, lines) if line.get("operation", "").startswith("Set")}
        assert reasons == {"apply the provisioning configuration"}


async def test_a_step_that_the_policy_denies_is_tried_once_and_vfs_stay_healthy() -> None:
    async with running_node(bare(PF0, PF1)) as node:
        policy = node.directory / "policy.toml"
        policy.write_text(
            f'addresses = ["{PF1}", {", ".join(f"{chr(34)}0001:6b:00.{n}{chr(34)}" for n in range(1, 5))}]'
        )
        config = ConfigMap(node.directory / "config")
        config.write(COMPRESSION)
        node.add_server_options(f"--provisioning-config={config.directory}", "--resync-interval=50ms")
        node.helper_options = (f"--policy={policy}",)
        node.start_helper()
        node.start_server()
        await serves(node, {DC: 4})
        status = await node.until_status("it is reported", lambda status: of(status).stage == "failed")
        assert f"the helper's policy does not allow {PF0}: " in of(status).reason
        for _ in range(5):
            await node.status()
        assert story(node) == [("SetServices", "denied", None, None)]
        await node.stop_helper()
        node.helper_options = ()
        node.start_helper()
        await serves(node, {DC: 8})


async def test_existing_vfs_are_served_while_the_helper_is_away() -> None:
    async with provisioned(bare(PF0), CRYPTO) as (node, config):
        await serves(node, {CY: 4})
        await node.stop_helper(signal.SIGKILL)
        await node.until_status("the server knows", lambda status: not status.helper.connected)
        config.write(COMPRESSION)
        status = await node.until_status("it is reported", lambda status: of(status).stage in ("waiting", "failed"))
        assert node.kubelet.allocatable() == {CY: 4}
        assert all(not vf.reason for vf in status.vfs)
        node.start_helper()
        await serves(node, {DC: 4})
