"""AppArmor's state as read by a process, and the refusals for which there is advice."""

import errno
from pathlib import Path

import pytest

from qat_server.binding.apparmor import AppArmor, read_apparmor

CONTAINERD = "cri-containerd.apparmor.d"

STATES: dict[str, tuple[dict[str, str], AppArmor]] = {
    "nothing to read": ({}, AppArmor()),
    "off": ({"sys/module/apparmor/parameters/enabled": "N\n", "proc/self/attr/current": "kernel\n"}, AppArmor(False)),
    "a container's default": (
        {"sys/module/apparmor/parameters/enabled": "Y\n", "proc/self/attr/current": f"{CONTAINERD} (enforce)\n"},
        AppArmor(True, CONTAINERD),
    ),
    "unconfined": (
        {"sys/module/apparmor/parameters/enabled": "Y\n", "proc/self/attr/current": "unconfined\n"},
        AppArmor(True, "unconfined"),
    ),
    "with another module": (
        {
            "sys/module/apparmor/parameters/enabled": "Y\n",
            "proc/self/attr/current": "_\n",
            "proc/self/attr/apparmor/current": "docker-default (complain)\n",
        },
        AppArmor(True, "docker-default"),
    ),
}


@pytest.mark.parametrize(("files", "expected"), STATES.values(), ids=STATES)
def test_read_apparmor(files: dict[str, str], expected: AppArmor, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_apparmor(tmp_path / "sys", tmp_path / "proc") == expected


ADVICE: dict[str, tuple[AppArmor, int, str]] = {
    "refused in a container": (AppArmor(True, CONTAINERD), errno.EACCES, f"this one is under {CONTAINERD}"),
    "not permitted in a container": (AppArmor(True, CONTAINERD), errno.EPERM, "type: Unconfined"),
    "the server is unconfined": (AppArmor(True, "unconfined"), errno.EACCES, "localhostProfile: qat-helper"),
    "under our profile": (AppArmor(True, "qat-server"), errno.EACCES, "dmesg | grep DENIED"),
    "it cannot be read": (AppArmor(), errno.EACCES, "if AppArmor is on"),
}


@pytest.mark.parametrize(("apparmor", "refusal", "words"), ADVICE.values(), ids=ADVICE)
def test_advice(apparmor: AppArmor, refusal: int, words: str) -> None:
    assert words in apparmor.advice(refusal)


@pytest.mark.parametrize(
    ("apparmor", "refusal"),
    [
        (AppArmor(False), errno.EACCES),
        (AppArmor(True, CONTAINERD), errno.EROFS),
        (AppArmor(True, CONTAINERD), 0),
        (AppArmor(), errno.EPERM),
    ],
)
def test_no_advice_for_other_refusals(apparmor: AppArmor, refusal: int) -> None:
    assert apparmor.advice(refusal) == ""
