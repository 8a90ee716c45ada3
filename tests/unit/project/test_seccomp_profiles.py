"""The seccomp profiles as texts: what they say is documented, known on both architectures, and what is installed."""

import ctypes
import json
import re
from ctypes.util import find_library
from pathlib import Path

import pytest

import qat_helper
import qat_server.host
from qat_shared.seccomp import START, Profile, Rule, read_profile

ROOT = Path(__file__).parents[3]
PROFILES = {"helper": ROOT / "seccomp/qat-helper.json", "server": ROOT / "seccomp/qat-server.json"}
PACKAGES = {"helper": qat_helper, "server": qat_server.host}
NEVER = [
    "execve",
    "execveat",
    "ptrace",
    "mount",
    "umount2",
    "bpf",
    "unshare",
    "setns",
    "keyctl",
    "add_key",
    "process_vm_writev",
    "process_vm_readv",
    "kill",
    "vfork",
    "chroot",
    "pivot_root",
    "init_module",
    "finit_module",
    "kexec_load",
    "open_by_handle_at",
    "io_uring_setup",
    "userfaultfd",
    "perf_event_open",
    "pidfd_getfd",
    "personality",
    "memfd_create",
    "setuid",
    "setresuid",
    "capset",
    "prctl",
    "seccomp",
    "truncate",
]


def calls(rules: list[Rule]) -> set[str]:
    return {name for rule in rules for name in rule.names}


def serving(profile: Profile) -> list[Rule]:
    return [rule for rule in profile.syscalls if rule.comment != START]


def starting(profile: Profile) -> list[Rule]:
    return [rule for rule in profile.syscalls if rule.comment == START]


def documented(title: str) -> set[str]:
    """The calls of the table beneath a heading of docs/seccomp.md, each with a reason."""
    text = (ROOT / "docs/seccomp.md").read_text()
    section = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", section, re.MULTILINE)
    assert all(reason.strip() for _, reason in rows)
    assert [name for name, _ in rows] == sorted(name for name, _ in rows), title
    return {name for name, _ in rows}


@pytest.mark.parametrize("process", PROFILES)
def test_each_call_has_its_reason_in_the_docs(process: str) -> None:
    profile = read_profile(PROFILES[process])
    both = documented("Both processes, while they serve")
    own = documented(f"The {process}, while it serves")
    assert both & own == set()
    assert calls(serving(profile)) == both | own
    assert calls(starting(profile)) == documented(f"The {process}, until it serves")


@pytest.mark.parametrize("process", PROFILES)
def test_it_is_an_oci_profile_that_refuses_by_default(process: str) -> None:
    known = {"defaultAction", "defaultErrnoRet", "syscalls"}
    plain = json.loads(PROFILES[process].read_text())
    assert set(plain) == known
    for rule in plain["syscalls"]:
        assert set(rule) <= {"names", "action", "errnoRet", "args", "comment"}
        assert rule.get("comment", START) == START
        assert rule["action"] == "SCMP_ACT_ALLOW" or rule["names"] == ["clone3"]
        for argument in rule.get("args", ()):
            assert set(argument) <= {"index", "value", "valueTwo", "op"}
        assert len({argument["index"] for argument in rule.get("args", ())}) == len(rule.get("args", ())), (
            "runc ORs them"
        )
    profile = read_profile(PROFILES[process])
    assert (profile.default_action, profile.default_errno_ret) == ("SCMP_ACT_ERRNO", 1)
    allowed = calls(serving(profile)) - ({"prctl"} if process == "server" else set())
    assert allowed.isdisjoint(NEVER)
    assert "wait4" not in allowed


@pytest.mark.skipif(find_library("seccomp") is None, reason="libseccomp.so.2 (Debian: libseccomp2) is not installed")
@pytest.mark.parametrize("process", PROFILES)
def test_each_call_is_one_on_some_architecture(process: str) -> None:
    library = ctypes.CDLL("libseccomp.so.2")
    architectures = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
    for name in calls(list(read_profile(PROFILES[process]).syscalls)):
        numbers = [library.seccomp_syscall_resolve_name_arch(arch, name.encode()) for arch in architectures.values()]
        assert any(number >= 0 for number in numbers), name


@pytest.mark.parametrize("process", PROFILES)
def test_what_one_architecture_lacks_the_other_call_does(process: str) -> None:
    """The calls of aarch64's C library stand beside those of x86_64 that it does without."""
    instead = {
        "stat": "newfstatat", "access": "faccessat", "readlink": "readlinkat", "unlink": "unlinkat",
        "rename": "renameat", "mkdir": "mkdirat", "chmod": "fchmodat", "symlink": "symlinkat",
        "epoll_wait": "epoll_pwait", "poll": "ppoll", "fork": "clone", "lchown": "fchownat",
    }  # fmt: skip
    rules = read_profile(PROFILES[process])
    for kind in (serving(rules), list(rules.syscalls)):
        names = calls(kind)
        assert {new for old, new in instead.items() if old in names} <= names


@pytest.mark.parametrize("process", PROFILES)
def test_the_installed_profile_is_this_file(process: str) -> None:
    installed = Path(PACKAGES[process].__file__ or "").with_name("seccomp.json")
    assert installed.resolve() == PROFILES[process]
