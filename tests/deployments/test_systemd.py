"""The systemd units: verified, scored, and their system call filters tried on the real programs."""

import errno
import functools
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from deployments import containers, images, measured, rendered
from deployments.pods import pod_node
from deployments.rendered import DEPLOYMENTS
from qat_helper.options import parse as helper_options
from qat_server.command_line import settings
from qat_server.host.startup import START_TIMEOUT
from qat_simulation.node.description import demo_node

UNITS: Final = DEPLOYMENTS / "systemd"
SERVICES: Final = {"qat-helper.service": 0.8, "qat-plugin.service": 1.5}
"""By service, the most that its exposure (0 is best, 10 worst) may be."""
_ANALYZE: Final = shutil.which("systemd-analyze")

needs_analyze = pytest.mark.skipif(_ANALYZE is None, reason="needs systemd-analyze (Debian's package systemd)")


def settings_of(unit: str) -> dict[str, list[str]]:
    """All values of each setting of a unit file, whatever its section."""
    found: dict[str, list[str]] = {}
    for line in (UNITS / unit).read_text().splitlines():
        if line and line[0] not in "#;[":
            name, value = line.split("=", 1)
            found.setdefault(name, []).append(value)
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine on which all that the units name is installed."""
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    for unit in (*SERVICES, "qat-helper.socket"):
        shutil.copy(UNITS / unit, units)
    for program in ("helper/bin/qat-helper", "server/bin/qat-plugin"):
        path = tmp_path / "opt/qat-plugin" / program
        path.parent.mkdir(parents=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    # Units that ours are ordered by or hang on implicitly.
    for name in ("sysinit", "basic", "shutdown", "sockets", "network", "multi-user", "umount", "local-fs"):
        (units / f"{name}.target").write_text("[Unit]\n")
    return tmp_path


@needs_analyze
@pytest.mark.parametrize("unit", [*SERVICES, "qat-helper.socket"])
def test_a_unit_is_verified(unit: str, root: Path) -> None:
    done = _verify(root, unit)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_analyze
def test_verifying_finds_what_is_wrong(root: Path) -> None:
    path = root / "etc/systemd/system/qat-helper.service"
    text = path.read_text()
    path.write_text(text.replace("ProtectClock=yes", "ProtectClok=yes"))
    assert "ProtectClok" in _verify(root, path.name).stderr
    path.write_text(text)
    (root / "opt/qat-plugin/helper/bin/qat-helper").unlink()
    assert _verify(root, path.name).returncode != 0


def _verify(root: Path, unit: str) -> "subprocess.CompletedProcess[str]":
    command = ["systemd-analyze", "verify", f"--root={root}", "--man=no", "--recursive-errors=yes", unit]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@needs_analyze
@pytest.mark.parametrize("unit", SERVICES)
def test_a_service_is_as_little_exposed_as_it_can_be(unit: str) -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", os.fspath(UNITS / unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+) (\w+)", done.stdout)
    assert found is not None, done.stdout
    measured.note(f"systemd-analyze security: {unit} {found[1]} {found[2]}")
    assert float(found[1]) <= SERVICES[unit]


def test_paths_agree_with_the_programs_defaults() -> None:
    helper, server = settings_of("qat-helper.service"), settings_of("qat-plugin.service")
    defaults = settings.parse()
    assert settings_of("qat-helper.socket")["ListenSequentialPacket"] == [str(defaults.helper_socket)]
    assert helper_options([]).audit_log.parent == Path("/var/log", *helper["LogsDirectory"])
    writable = {path.removeprefix("-") for line in helper["ReadWritePaths"] for path in line.split()}
    assert {"/sys/bus/pci", "/sys/devices", str(defaults.socket_directory.parent)} <= writable
    assert str(defaults.socket_directory) in server["BindPaths"]
    assert settings.parse({"metrics-address": server["Environment"][0].partition("=")[2]}).metrics_address is not None
    assert helper["Before"] == server["Before"] == ["kubelet.service"]


def test_both_services_require_their_sandbox() -> None:
    """The files of variables are read after Environment=, so an administrator can say otherwise."""
    assert "QAT_HELPER_REQUIRE_SANDBOX=true" in settings_of("qat-helper.service")["Environment"]
    assert "QAT_PLUGIN_REQUIRE_SANDBOX=true" in settings_of("qat-plugin.service")["Environment"]
    assert settings_of("qat-helper.service")["RestrictSUIDSGID"] == ["yes"]


def test_the_way_to_the_servers_directories_is_open() -> None:
    """Parents of mount points that systemd itself makes get UMask='s mode: each has a file system of its own, 0755."""
    server = settings_of("qat-plugin.service")
    made = {path.partition(":")[0] for line in server["TemporaryFileSystem"] for path in line.split()}
    assert {str(Path(path.removeprefix("-")).parent) for path in server["BindPaths"]} <= made


def test_the_kubelet_waits_for_the_servers_start_and_never_for_ever() -> None:
    server = settings_of("qat-plugin.service")
    assert server["Before"] == ["kubelet.service"]
    assert (server["Type"], server["NotifyAccess"]) == (["notify"], ["main"])
    (limit,) = server["TimeoutStartSec"]
    # Until its loop runs, a server loads its libraries: a second, and many on a busy machine that boots.
    assert int(limit.removesuffix("s")) >= START_TIMEOUT + 30
    assert server["Restart"] == ["on-failure"]
    # Nothing that the server waits for may wait for the kubelet.
    for unit in ("qat-helper.service", "qat-helper.socket", "qat-plugin.service"):
        for name in ("After", "Requires", "Wants", "BindsTo", "Requisite"):
            assert "kubelet" not in " ".join(settings_of(unit).get(name, []))


def test_the_socket_of_systemd_is_open_to_the_server() -> None:
    """No setting of the unit takes it out of sight, and the server may make a datagram socket."""
    server = settings_of("qat-plugin.service")
    assert "AF_UNIX" in server["RestrictAddressFamilies"][0].split()
    hidden = [path for line in server["InaccessiblePaths"] for path in line.split()]
    hidden += [path.partition(":")[0] for line in server["TemporaryFileSystem"] for path in line.split()]
    assert not [path for path in hidden if "/run/systemd/notify".startswith(path.removeprefix("-"))]
    assert "PrivateNetwork" not in server, "NOTIFY_SOCKET may be an abstract name"
    profile = (DEPLOYMENTS.parent / "apparmor/qat-server").read_text()
    assert "/{,var/}run/systemd/notify w," in profile


def test_the_services_have_no_capability_and_only_the_helper_is_root() -> None:
    for unit, user in (("qat-helper.service", "root"), ("qat-plugin.service", "qat-plugin")):
        found = settings_of(unit)
        assert found["User"] == [user]
        assert found["Group"] == ["qat-plugin"]
        assert found["CapabilityBoundingSet"] == found["AmbientCapabilities"] == [""]
        assert found["NoNewPrivileges"] == ["yes"]


@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="needs systemd-sysusers")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files are given to the users made")
def test_users_and_directories_are_made(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    subprocess.run(["systemd-sysusers", f"--root={tmp_path}", UNITS / "qat-plugin.sysusers.conf"], check=True)
    (line,) = [each for each in (tmp_path / "etc/passwd").read_text().splitlines() if each.startswith("qat-plugin:")]
    _, _, uid, gid, _, home, shell = line.split(":")
    assert (home, shell) == ("/", "/usr/sbin/nologin")
    assert int(uid) != 0
    command = ["systemd-tmpfiles", f"--root={tmp_path}", "--create", os.fspath(UNITS / "qat-plugin.tmpfiles.conf")]
    subprocess.run(command, check=True)
    made = {
        path: (status.st_mode & 0o7777, status.st_uid, status.st_gid)
        for path in ("run/qat-plugin", "var/lib/kubelet/device-plugins", "var/lib/kubelet/device-plugins/qat.intel.com")
        for status in [(tmp_path / path).stat()]
    }
    assert made == {
        "run/qat-plugin": (0o750, 0, int(gid)),
        "var/lib/kubelet/device-plugins": (0o750, 0, 0),
        "var/lib/kubelet/device-plugins/qat.intel.com": (0o770, 0, int(gid)),
    }


@needs_analyze
@pytest.mark.usefixtures("kustomize")
@pytest.mark.skipif(bool(images.why_not()), reason=images.why_not())
@pytest.mark.skipif(bool(containers.why_not()), reason=containers.why_not())
async def test_the_programs_work_under_the_services_filters() -> None:
    """SystemCallFilter=, RestrictAddressFamilies= and MemoryDenyWriteExecute=, as seccomp rules on both containers."""
    manifests = rendered.render("base")
    for name, unit in (("helper", "qat-helper.service"), ("server", "qat-plugin.service")):
        context = rendered.container(rendered.pod_spec(manifests), name)["securityContext"]
        context["seccompProfile"] = {"type": "Given", "profile": _as_profile(unit)}
    async with pod_node(demo_node(), manifests) as node:
        node.start_helper()
        node.start_server()
        await node.until_status("the server is ready", lambda status: status.ready and len(status.resources) > 0)
        await node.kubelet.restart()
        await node.until("registered again", node.kubelet.allocatable)
        trial = "import socket; socket.socket(socket.AF_INET)"
        assert "PermissionError" in node.made["helper"].run_inside("python3", "-c", trial).stderr
        assert node.made["server"].run_inside("python3", "-c", trial).returncode == 0
        trial = "import mmap; mmap.mmap(-1, 4096, prot=7)"
        for container in node.made.values():
            assert "PermissionError" in container.run_inside("python3", "-c", trial).stderr


def _as_profile(unit: str) -> dict[str, Any]:
    """An OCI seccomp profile of what a unit's settings leave; EPERM for all else, as SystemCallErrorNumber= says."""
    found = settings_of(unit)
    assert found["SystemCallErrorNumber"] == ["EPERM"]
    assert found["MemoryDenyWriteExecute"] == ["yes"]
    families = [int(getattr(socket, name)) for name in found["RestrictAddressFamilies"][0].split()]
    plain = sorted(allowed_calls(unit) - {"socket", "mmap", "mprotect", "pkey_mprotect"})
    # Either of PROT_WRITE (2) and PROT_EXEC (4), or none; and PROT_EXEC is never added.
    either = [{"index": 2, "value": 6, "valueTwo": bits, "op": "SCMP_CMP_MASKED_EQ"} for bits in (0, 2, 4)]
    never = {"index": 2, "value": 4, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}
    rules: list[dict[str, Any]] = [{"names": plain, "action": "SCMP_ACT_ALLOW"}]
    rules += [{"names": ["mmap"], "action": "SCMP_ACT_ALLOW", "args": [each]} for each in either]
    rules += [{"names": ["mprotect", "pkey_mprotect"], "action": "SCMP_ACT_ALLOW", "args": [never]}]
    rules += [
        {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": family, "op": "SCMP_CMP_EQ"}]}
        for family in families
    ]
    return {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": errno.EPERM, "syscalls": rules}


@functools.cache
def allowed_calls(unit: str) -> frozenset[str]:
    """The system calls that a unit's filter allows: its lines in order, a list with ~ taken away."""
    allowed: set[str] = set()
    for line in settings_of(unit)["SystemCallFilter"]:
        named = {call for name in line.removeprefix("~").split() for call in _expanded(name)}
        allowed = allowed - named if line.startswith("~") else allowed | named
    return frozenset(allowed)


def _expanded(name: str) -> Iterator[str]:
    if not name.startswith("@"):
        yield name
        return
    done = subprocess.run(
        ["systemd-analyze", "--no-pager", "syscall-filter", name], capture_output=True, text=True, check=True
    )
    for line in done.stdout.splitlines()[1:]:
        if (inner := line.strip()) and not inner.startswith("#"):
            yield from _expanded(inner)
