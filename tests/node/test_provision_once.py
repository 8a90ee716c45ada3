"""`qat-plugin provision` and `config check` as users run them: the table, the changes and the exit status."""

import asyncio
import errno
import json
from pathlib import Path

import msgspec
import pytest

from node.test_provisioning import CRYPTO, PF0, PF1, bare, read
from qat_simulation.kubelet.config_map import ConfigMap
from qat_simulation.node.description import Node
from qat_simulation.running_node import RunningNode, command, running_node

DONE, FAILED, WRONG, NOTHING, WAITING = 0, 1, 2, 10, 11
VF = "0000:6b:00.1"


async def run(*arguments: str) -> tuple[int, str]:
    """The exit status and all output."""
    process = await asyncio.create_subprocess_exec(
        *command("qat-plugin"), *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


async def provision(node: RunningNode, config: ConfigMap, *more: str) -> tuple[int, str]:
    return await run(
        "provision",
        f"--provisioning-config={config.directory}",
        f"--sysfs-root={node.kernel.sysfs_root}",
        f"--helper-socket={node.helper_socket}",
        *more,
    )


def row(output: str, pf: str) -> str:
    return next(line for line in output.splitlines() if line.startswith(f"{pf} ("))


async def test_a_bare_node_is_provisioned_and_then_there_is_nothing_to_do() -> None:
    async with running_node(bare(PF0, PF1)) as node:
        config = ConfigMap(node.directory / "config")
        config.write({"qat.conf": "ServicesEnabled=dc\nAutoresetEnabled=on\n"})
        node.start_helper()
        status, output = await provision(node, config, "--dry-run")
        assert status == DONE
        assert "services dc, 4 VFs" in row(output, PF0)
        assert "sym;asym" in row(output, PF0) or "asym;sym" in row(output, PF0)
        assert read(node, "sriov_numvfs") == "0", "a dry run does nothing"
        assert '"Set' not in node.audit_log.read_text()
        status, output = await provision(node, config)
        assert status == DONE
        assert f"{PF1}: services dc: done (sym;asym before, dc now)" in output
        for pf in (PF0, PF1):
            assert [read(node, name, pf) for name in ("sriov_numvfs", "qat/cfg_services", "qat/auto_reset")] == [
                "4",
                "dc",
                "on",
            ]
        assert (await provision(node, config))[0] == NOTHING
        assert (await provision(node, config, "--dry-run"))[0] == NOTHING
        assert (await provision(node, config, "--init"))[0] == DONE


async def test_vfs_in_use_are_shown_and_give_an_exit_status() -> None:
    async with running_node(bare(PF0, PF1)) as node:
        config = ConfigMap(node.directory / "config")
        config.write(CRYPTO)
        node.start_helper()
        node.start_server()
        assert (await provision(node, config))[0] == DONE
        await node.until("all are served", lambda: node.kubelet.allocatable() == {"qat.intel.com/cy": 8})
        pod = await node.kubelet.allocate("crypto", [("main", "qat.intel.com/cy", 1)])
        assert pod.containers["main"].envs["QAT0"] == VF
        config.write({"qat.conf": "ServicesEnabled=dc\n"})
        status, output = await provision(node, config, "--dry-run")
        assert status == WAITING
        assert "default/crypto/main" in row(output, PF0)
        assert "when free: services dc, 4 VFs" in row(output, PF0)
        status, output = await provision(node, config)
        assert status == WAITING
        assert (read(node, "qat/cfg_services"), read(node, "qat/cfg_services", PF1)) == ("sym;asym", "dc")
        assert (await provision(node, config, "--init"))[0] == DONE
        node.kubelet.free("crypto")
        with node.kernel.open_vfio(VF):
            status, output = await provision(node, config)
            assert (status, "a process" in row(output, PF0)) == (WAITING, True)
        assert (await provision(node, config))[0] == DONE


async def test_a_failure_is_reported_and_the_other_pfs_are_done() -> None:
    async with running_node(bare(PF0, PF1)) as node:
        config = ConfigMap(node.directory / "config")
        config.write({"qat.conf": "ServicesEnabled=dc\n"})
        node.start_helper()
        node.kernel.fail_next(PF0, "qat/cfg_services", errno.EINVAL)
        status, output = await provision(node, config)
        assert status == FAILED
        assert f"{PF0}: failed: services dc: {PF0}: the kernel refused to write 'dc' to qat/cfg_services" in output
        assert [read(node, name) for name in ("qat/cfg_services", "qat/state", "sriov_numvfs")] == [
            "asym;sym",
            "up",
            "4",
        ]
        assert [read(node, name, PF1) for name in ("qat/cfg_services", "sriov_numvfs")] == ["dc", "4"]
        node.kernel.fail_next(PF0, "qat/state", errno.EBUSY)
        status, output = await provision(node, config)
        assert (status, "Device or resource busy" in output) == (FAILED, True)
        config.write({"qat.conf": "ServicesEnabled=sym;asym;dc\n"})
        status, output = await provision(node, config)
        assert (status, "impossible" in row(output, PF0)) == (FAILED, True)


async def test_a_missing_helper_and_invalid_settings() -> None:
    async with running_node(bare(PF0)) as node:
        config = ConfigMap(node.directory / "config")
        config.write(CRYPTO)
        status, output = await provision(node, config, "--wait=50ms")
        assert status == FAILED
        assert "cannot reach the helper" in output
        status, output = await provision(node, config, "--wait=50ms", "--dry-run")
        assert status == DONE, "it has no VFs: nobody can hold one"
        config.write({"qat.conf": "ServicesEnabled=sym;asym\nServicesEnabled=dc\n"})
        status, output = await provision(node, config)
        assert (status, output) == (
            WRONG,
            "qat-plugin: qat.conf line 2: ServicesEnabled: is already set on line 1; remove one of the two\n",
        )
        assert (await provision(node, config, "--wait=soon"))[0] == WRONG
        assert (await provision(node, config, "--kernel-vf-drivers=none"))[0] == WRONG


def described(tmp_path: Path, node: Node) -> str:
    file = tmp_path / "node.json"
    file.write_bytes(msgspec.json.encode(node))
    return str(file)


@pytest.mark.parametrize(
    ("files", "status", "steps"),
    [
        ({}, 0, "4 VFs"),
        ({"qat.conf": "ServicesEnabled=dc"}, 0, "services dc, 4 VFs"),
        ({"qat.conf": "ServicesEnabled=sym;asym;dc"}, 1, "it supports at most two services"),
        ({"qat.toml": "defaults.vfs = 0"}, 0, "none"),
    ],
)
async def test_config_check_shows_the_plan_of_a_described_node(
    tmp_path: Path, files: dict[str, str], status: int, steps: str
) -> None:
    config = ConfigMap(tmp_path / "config")
    config.write(files)
    found, output = await run("config", "check", str(config.directory), "--node", described(tmp_path, bare(PF0)))
    assert found == status
    assert steps in row(output, PF0)


async def test_config_check_of_a_sysfs_tree_and_of_invalid_files(tmp_path: Path) -> None:
    async with running_node(bare(PF0, PF1)) as node:
        config = ConfigMap(node.directory / "config")
        config.write({"qat-n1.conf": "ServicesEnabled=dc", "qat.conf": "ServicesEnabled=sym"})
        root = f"--sysfs-root={node.kernel.sysfs_root}"
        status, output = await run("config", "check", str(config.directory), root, "--node-name", "n1")
        assert (status, "services dc, 4 VFs" in row(output, PF1)) == (0, True)
        config.write({"qat.toml": "\n[[rules]]\nservices = 'dc'\n"})
        status, output = await run("config", "check", str(config.directory), root)
        assert (status, "qat.toml line 2: rules[0]: selects no PF" in output) == (2, True)
        broken = tmp_path / "broken.json"
        broken.write_text(json.dumps({"pfs": [{"address": "6b"}]}))
        status, output = await run("config", "check", str(config.directory), "--node", str(broken))
        assert status == 2
