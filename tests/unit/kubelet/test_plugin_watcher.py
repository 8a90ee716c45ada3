"""What is said to the kubelet's plugin watcher, and what its word leads to."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from qat_server.kubelet.generated import pluginregistration_v1_pb2 as pb
from qat_server.kubelet.registration.plugin_watcher import WatcherRegistrar, socket_name
from qat_server.kubelet.registration.registrar import CannotRegisterError, Timing
from qat_server.kubelet.watch_streams import WatchStreams

CONTEXT: Any = None  # neither answer needs it
PATIENT, SHORT = Timing(found=60), Timing(found=0.01)


def registrar(timing: Timing = PATIENT) -> WatcherRegistrar:
    return WatcherRegistrar("cy", Path("/registry/qat.intel.com"), timing)


async def say(to: WatcherRegistrar, error: str = "", registered: bool = False) -> None:
    await to.NotifyRegistrationStatus(pb.RegistrationStatus(plugin_registered=registered, error=error), CONTEXT)


async def asked(of: WatcherRegistrar, streams: WatchStreams | None = None) -> asyncio.Task[None]:
    task = asyncio.create_task(of.register(streams or WatchStreams()))
    await asyncio.sleep(0)
    await of.GetInfo(pb.InfoRequest(), CONTEXT)
    return task


async def test_the_endpoint_is_the_registration_socket_itself() -> None:
    info = await registrar().GetInfo(pb.InfoRequest(), CONTEXT)
    assert (info.type, info.name, info.endpoint) == ("DevicePlugin", "qat.intel.com/cy", "")
    assert list(info.supported_versions) == ["v1beta1"]


def test_each_life_has_a_name_of_its_own_and_keeps_it() -> None:
    one, other = registrar(), registrar()
    assert one.socket_path != other.socket_path
    assert one.socket_path == one.socket_path
    name = one.socket_path.name
    assert name.startswith("cy-")
    assert name.endswith(".sock")
    assert len(name) == len(socket_name("cy")) == len("cy-01234567.sock")


async def test_the_kubelet_takes_it() -> None:
    one = registrar()
    task = await asked(one)
    assert not task.done()
    await say(one, registered=True)
    await task


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("no such version", "the kubelet refused: no such version"),
        ("", "the kubelet refused: no reason given"),
        ("x" * 100_000, "the kubelet refused: " + "x" * 500),
    ],
    ids=["a reason", "no reason", "a long one"],
)
async def test_the_kubelet_refuses(error: str, sentence: str) -> None:
    one = registrar()
    task = await asked(one)
    await say(one, error)
    with pytest.raises(CannotRegisterError) as refused:
        await task
    assert str(refused.value) == sentence


async def test_a_kubelet_that_does_not_come_and_one_that_has_refused_before() -> None:
    one = registrar(SHORT)
    with pytest.raises(CannotRegisterError, match=f"has not asked at {one.socket_path}: is it running"):
        await one.register(WatchStreams())
    task = await asked(one)
    await say(one, "never")
    with pytest.raises(CannotRegisterError, match="the kubelet refused: never"):
        await task
    with pytest.raises(CannotRegisterError, match="has not asked"):  # a refusal is not for ever
        await one.register(WatchStreams())


async def test_one_that_refused_and_came_by_itself_in_the_pause_is_not_held_to_its_word() -> None:
    one, streams = registrar(SHORT), WatchStreams()
    task = await asked(one, streams)
    await say(one, "dial timed out")
    with pytest.raises(CannotRegisterError, match="dial timed out"):
        await task
    streams.open()
    await one.register(streams)


async def test_a_word_at_the_wrong_time_or_twice_does_nothing() -> None:
    one = registrar()
    await say(one, "too early")
    task = await asked(one)
    await say(one, registered=True)
    await say(one, "changed its mind")
    await task
    await say(one, "too late")
    again = await asked(one)
    assert not again.done()
    await say(one, registered=True)
    await again


async def test_a_kubelet_that_came_by_itself_is_not_waited_for() -> None:
    streams = WatchStreams()
    streams.open()
    await registrar().register(streams)
    streams = WatchStreams()
    task = await asked(registrar(SHORT), streams)
    streams.open()  # its word is lost
    await task


async def test_its_word_may_come_before_it_is_waited_for_but_a_stale_one_does_not_count() -> None:
    one = registrar(SHORT)
    await one.GetInfo(pb.InfoRequest(), CONTEXT)
    await say(one, registered=True)
    await one.register(WatchStreams())
    await one.GetInfo(pb.InfoRequest(), CONTEXT)
    await say(one, registered=True)
    await one.GetInfo(pb.InfoRequest(), CONTEXT)  # another kubelet
    with pytest.raises(CannotRegisterError, match="has not asked"):
        await one.register(WatchStreams())


async def test_a_new_socket_is_for_a_kubelet_that_does_not_come_by_itself() -> None:
    one, streams = registrar(Timing(by_itself=0.01)), WatchStreams()
    assert await one.needs_new_socket(streams)
    streams.open()
    assert not await one.needs_new_socket(streams)
    streams.end()
    await one.GetInfo(pb.InfoRequest(), CONTEXT)
    assert not await one.needs_new_socket(streams)
    one = registrar(Timing(by_itself=60))
    coming = asyncio.create_task(one.needs_new_socket(WatchStreams()))
    await asyncio.sleep(0)
    await one.GetInfo(pb.InfoRequest(), CONTEXT)
    assert not await coming
