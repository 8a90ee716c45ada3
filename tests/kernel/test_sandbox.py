"""Both sandboxes on the real kernel: what is forbidden is refused, and in all that a node does nothing else is."""

import asyncio
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
from msgspec.structs import replace

from helper_security import forbidden
from helper_security.build_writable import files
from helper_security.forbidden import unexpected
from helper_security.test_confinement import answers
from kernel.nodes import PF, SMALL, TWO_SMALL, VF
from kernel.real_node import RealNode, real_node
from kernel.refusals import Refusals, refusals
from kernel.test_provisioning import configured
from kubelet.nodes import CY, DC
from qat_server.kubelet.registration.directories import Registration
from qat_simulation.node.description import Node
from qat_simulation.running_node import command

ATTEMPTS = Path(forbidden.__file__).parent
EXPECTED = {
    ("clone3", "ENOSYS"): "answered so by both profiles: the C library then calls clone",
    ("io_uring_setup", "EPERM"): "libuv asks, and does without",
    ("prctl", "EPERM"): "gRPC gives its memory names (PR_SET_VMA), or does not",
    ("socket", "EPERM"): "gRPC asks whether there are IPv4 and IPv6; only Unix sockets are used",
    ("getpeername", "EPERM"): "Python says at the helper's end which sockets the end itself closes",
    ("access", "EACCES"): "the server asks whether the helper has prepared its directory, which it has not yet",
}
"""What libraries try and do without, and what is asked to be told no: all that may be refused."""
OF_HELPER = {("clone3", "ENOSYS"), ("getpeername", "EPERM")}


def of_our_own(directory: Path) -> Path:
    """A directory outside of all that the processes may use, with their builds for tests in it."""
    outside = directory / "outside"
    shutil.copytree(ATTEMPTS, outside / "code/helper_security", ignore=shutil.ignore_patterns("__pycache__"))
    (outside / "there").write_text("untouched\n")
    (outside / "there").chmod(0o666)
    return outside


def build(words: list[str], name: str, outside: Path) -> list[str]:
    """A command with the build for tests instead of the program."""
    script = f"build_{'helper' if name == 'helper' else 'server'}.py"
    return with_script(words, name, outside, script, os.fspath(outside))


def with_script(words: list[str], name: str, outside: Path, script: str, *options: str) -> list[str]:
    """A command with a script of tests/helper_security instead of the program."""
    at = words.index(command(f"qat-{name}")[0])
    path = os.fspath(outside / "code/helper_security" / script)
    return [*words[:at], "env", f"PYTHONPATH={outside / 'code'}", sys.executable, path, *options, *words[at + 1 :]]


def test_without_the_sandbox_root_may_do_all_of_it(tmp_path: Path) -> None:
    outside = of_our_own(tmp_path)
    words = [sys.executable, os.fspath(ATTEMPTS / "forbidden.py"), os.fspath(outside), "helper", "server"]
    for results in json.loads(subprocess.run(words, check=True, capture_output=True).stdout):
        assert set(results) - set(unexpected(results)) == set(), "refused without a sandbox: no test of one"


async def test_what_is_forbidden_is_refused_in_both_processes(
    monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    with refusals() as refused:
        async with real_node(SMALL) as node:
            outside = of_our_own(node.directory)
            helper, server = (
                build([*refused.wrapper, *words], name, outside)
                for name, words in (("helper", node.helper_command()), ("plugin", node.server_command()))
            )
            monkeypatch.setattr(node, "helper_command", lambda: helper)
            monkeypatch.setattr(node, "server_command", lambda: server)
            await node.start({CY: 4})
            await node.until_bound()
            await node.until("the server has tried twice", lambda: len(answers(node.log("server"))) == 2)
            tried = {name: answers(node.log(name)) for name in ("helper", "server")}
            assert len(tried["helper"]) >= 6, "in the loop, before a peer and for one, and in a child for each VF"
            for name, each in tried.items():
                for results in each:
                    assert unexpected(results) == {}, name
            assert sorted(os.listdir(outside)) == ["code", "there"]
            assert (outside / "there").read_text() == "untouched\n"
        seen = {(refusal.call, refusal.errno) for refusal in refused.seen()}
    numbers = " and ".join(f"{len(each[0])} in the {name}" for name, each in tried.items())
    record_property("measured", f"forbidden things tried, each refused: {numbers}")
    for calls in (forbidden.CALLS, forbidden.HELPER_CALLS, forbidden.SERVER_CALLS):
        for call, _ in calls.values():
            assert {(call, "EPERM"), (call, "ENOSYS")} & seen, f"{call}: refused, and not seen by what looks for it"
    assert ("openat", "EACCES") in seen, "Landlock's refusals are seen too"


POWER: Final = ("power/async", "power/autosuspend_delay_ms", "power/control", "uevent")
OF_EACH_FUNCTION: Final = (
    *("broken_parity_status", "config", "d3cold_allowed", "driver_override", "enable", "msi_bus", "numa_node", "reset"),
    *("reset_method", *POWER),
)
WRITABLE: Final = {
    "bus/pci": ("drivers_probe",),
    "bus/pci/drivers/DRIVER": ("bind", "new_id", "remove_id", "uevent", "unbind"),
    "devices/pci0000:6b": POWER,
    "devices/pci0000:6b/pci_bus/0000:6b": ("rescan", *POWER),
    "devices/pci0000:6b/PF": (
        *(*OF_EACH_FUNCTION, "remove", "rescan", "sriov_drivers_autoprobe", "sriov_numvfs"),
        *("qat/auto_reset", "qat/cfg_services", "qat/pm_idle_enabled", "qat/rp2srv", "qat/state"),
        "qat_ras/reset_error_counters",
    ),
    "devices/pci0000:6b/VF": (*OF_EACH_FUNCTION, "sriov_vf_msix_count"),
    "devices/pci0000:6b/VF/vfio-dev/vfioN": POWER,
}
"""What the helper can open for writing of a real sysfs, by directory: Debian 12's kernel, and the devices of the test
module. Look at what a newer kernel adds before you add it here; docs/confinement.md says what the list means."""


async def test_exactly_these_files_of_sysfs_can_be_written(
    monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    """The guest's own devices, on another host bridge, are not among them."""
    async with real_node(SMALL) as node:
        outside = of_our_own(node.directory)
        helper = with_script(node.helper_command(), "helper", outside, "build_writable.py")
        monkeypatch.setattr(node, "helper_command", lambda: helper)
        await node.start({CY: 4})
        await node.until("it has tried", lambda: writable(node.log("helper")) != [])
        (found,) = writable(node.log("helper"))
        everything = {path for path in files("/sys") if os.stat(path).st_mode & stat.S_IWUSR}
    kinds = {re.escape(PF): "PF", r"0000:6b:00\.[1-4]": "VF", r"(?<=pci/drivers/)[^/]+": "DRIVER", r"vfio\d+": "vfioN"}
    patterns = set()
    for path in found:
        for kind, name in kinds.items():
            path = re.sub(rf"(?<=/){kind}(?=/)", name, path)  # noqa: PLW2901
        patterns.add(path.removeprefix("/sys/"))
    assert patterns == {f"{folder}/{name}" for folder, names in WRITABLE.items() for name in names}
    others = {path for path in everything - set(found) if path.startswith("/sys/devices/pci0000:00/")}
    assert len({path for path in others if path.endswith("/remove")}) > 1, "there are other devices"
    record_property(
        "measured", f"files of sysfs that root may write: {len(everything)}; that the helper can: {len(found)}"
    )


def writable(log: str) -> list[list[str]]:
    lines = (line for line in log.splitlines(keepends=True) if line.endswith("\n"))
    return [json.loads(line.partition(" ")[2]) for line in lines if line.startswith("writable: ")]


UNPROVISIONED = Node(pfs=tuple(replace(pf, num_vfs=0) for pf in TWO_SMALL.pfs))
ONE_REFUSED = """
import os
from qat_helper import sandbox
from qat_shared.seccomp import prepare, read_profile
prepare(read_profile(sandbox.PROFILE))()
os.sync()
"""
"""A call that the helper's profile lacks, which cannot fail otherwise."""


@contextmanager
def nothing_else_refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[Refusals]:
    """Nothing that is not in `EXPECTED` while the block runs; and that it would have been seen."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # which would be refused to the server
    with refusals() as refused:
        yield refused
        seen = refused.seen()
        assert {(each.call, each.errno) for each in seen} <= EXPECTED.keys(), seen
        assert {(each.call, each.errno) for each in seen if each.process == "qat-helper"} <= OF_HELPER, seen
        control = [*refused.wrapper, "setpriv", "--no-new-privs", sys.executable, "-c", ONE_REFUSED]
        subprocess.run(control, check=True)
        assert [each.errno for each in refused.seen() if each.call == "sync"] == ["EPERM"], "it would have been seen"


async def test_in_all_that_a_node_does_nothing_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a profile would lack something, and something would fail some day."""
    with nothing_else_refused(monkeypatch) as refused:
        async with real_node(UNPROVISIONED, ("--resync-interval=1s", "--health-interval=500ms")) as node:
            await all_that_a_node_does(node, refused)


async def test_nor_with_the_plugin_watcher(monkeypatch: pytest.MonkeyPatch) -> None:
    with nothing_else_refused(monkeypatch) as refused:
        async with real_node(SMALL, registration=Registration.PLUGIN_WATCHER) as node:
            node.helper_wrapper = node.server_wrapper = refused.wrapper
            await node.start({CY: 4})
            await node.until_bound()
            await node.kubelet.restart(kill=True)
            await node.wait({CY: 4})
            await node.stop_server()
            await node.stop_helper()


async def all_that_a_node_does(node: RealNode, refused: Refusals) -> None:
    """From a start without VFs to both processes' ends."""
    node.helper_wrapper = node.server_wrapper = refused.wrapper
    config = configured(node, "sym;asym")
    await node.start({CY: 4})
    await node.until_bound()
    await node.kubelet.allocate("pod", [("main", CY, 1)])
    with node.real.open_vfio(VF):
        config.write({"qat.conf": "ServicesEnabled=dc\n"})
        await node.until_status("it waits", lambda status: any(each.stage == "waiting" for each in status.provisioning))
    await node.kubelet.free("pod")
    await node.wait({DC: 4})
    node.real.unbind(VF)
    await node.until("it is bound again", lambda: node.real.driver(VF) == "vfio-pci")
    node.real.set_heartbeat(PF, -1)
    await node.wait({DC: 2})
    node.real.set_heartbeat(PF, 0)
    await node.wait({DC: 4})
    for page in ("/healthz", "/readyz", "/metrics", "/status"):
        assert (await node.get(page))[0] == 200, page
    status = await node.status()
    assert set(status.sandbox.values()) | set(status.helper.sandbox.values()) == {""}, "whole, both of them"
    options = [f"--kubelet-dir={node.kubelet_directory}", f"--helper-socket={node.helper_socket}"]
    asked = [*command("qat-plugin"), "doctor", "--json", *options]
    found = await asyncio.to_thread(subprocess.run, asked, check=False, capture_output=True)
    assert json.loads(found.stdout), found.stderr
    await node.kubelet.restart()
    await node.wait({DC: 4})
    await node.kubelet.restart(kill=True)
    await node.wait({DC: 4})
    await node.stop_server(signal.SIGKILL)
    await node.start_again({DC: 4})
    await node.stop_helper()
    await node.until_status("it is missed", lambda status: not status.helper.connected)
    node.start_helper()
    await node.until_status("it is back", lambda status: status.ready)
    node.real.unload()
    await node.wait({DC: 0})
    await node.stop_server()
    await node.stop_helper()
