"""Registration through the plugin watcher: GetInfo, the registration status, and what each leads to."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from qat_server.kubelet.generated import pluginregistration_v1_pb2 as pb
from qat_server.kubelet.registration.plugin_watcher import WatcherRegistrar, socket_name
from qat_server.kubelet.registration.registrar import CannotRegisterError, Timing
from qat_server.kubelet.watch_streams import WatchStreams

CONTEXT: Any = None  # neither RPC uses it
PATIENT, SHORT = Timing(discovery=60), Timing(discovery=0.01)


def registrar(timing: Timing = PATIENT) -> WatcherRegistrar:
    return WatcherRegistrar("cy", Path("/registry/qat.intel.com"), timing)


async def notify(to: WatcherRegistrar, error: str = "", registered: bool = False) -> None:
    await to.NotifyRegistrationStatus(pb.RegistrationStatus(plugin_registered=registered, error=error), CONTEXT)


async def registering(one: WatcherRegistrar, streams: WatchStreams | None = None) -> asyncio.Task[None]:
    """A `register` in progress, after the kubelet's GetInfo."""
    task = asyncio.create_task(one.register(streams or WatchStreams()))
    await asyncio.sleep(0)
    await one.GetInfo(pb.InfoRequest(), CONTEXT)
    return task


async def test_the_endpoint_is_the_registration_socket_itself() -> None:
    info = await registrar().GetInfo(pb.InfoRequest(), CONTEXT)
    assert (info.type, info.name, info.endpoint) == ("DevicePlugin", "qat.intel.com/cy", "")
    assert list(info.supported_versions) == ["v1beta1"]


def test_each_registrar_has_its_own_socket_name_and_keeps_it() -> None:
    one, other = registrar(), registrar()
    assert one.socket_path != other.socket_path
    assert one.socket_path == one.socket_path
    name = one.socket_path.name
    assert name.startswith("cy-")
    assert name.endswith(".sock")
    assert len(name) == len(socket_name("cy")) == len("cy-01234567.sock")


async def test_the_kubelet_registers_it() -> None:
    one = registrar()
    task = await registering(one)
    assert not task.done()
    await notify(one, registered=True)
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
    task = await registering(one)
    await notify(one, error)
    with pytest.raises(CannotRegisterError) as refused:
        await task
    assert str(refused.value) == sentence


async def test_a_kubelet_that_does_not_connect_also_after_a_refusal() -> None:
    one = registrar(SHORT)
    with pytest.raises(CannotRegisterError, match=f"has not called GetInfo at {one.socket_path}: is it running"):
        await one.register(WatchStreams())
    task = await registering(one)
    await notify(one, "never")
    with pytest.raises(CannotRegisterError, match="the kubelet refused: never"):
        await task
    with pytest.raises(CannotRegisterError, match="has not called GetInfo"):  # the earlier refusal no longer counts
        await one.register(WatchStreams())


async def test_a_kubelet_that_refused_and_then_connected_on_its_own_is_registered() -> None:
    one, streams = registrar(SHORT), WatchStreams()
    task = await registering(one, streams)
    await notify(one, "dial timed out")
    with pytest.raises(CannotRegisterError, match="dial timed out"):
        await task
    streams.open()
    await one.register(streams)


async def test_a_status_at_the_wrong_time_or_twice_is_ignored() -> None:
    one = registrar()
    await notify(one, "too early")
    task = await registering(one)
    await notify(one, registered=True)
    await notify(one, "changed its mind")
    await task
    await notify(one, "too late")
    again = await registering(one)
    assert not again.done()
    await notify(one, registered=True)
    await again


async def test_a_kubelet_that_has_connected_on_its_own_is_not_waited_for() -> None:
    streams = WatchStreams()
    streams.open()
    await registrar().register(streams)
    streams = WatchStreams()
    task = await registering(registrar(SHORT), streams)
    streams.open()  # its status is lost
    await task


async def test_a_status_may_come_before_register_but_a_stale_one_does_not_count() -> None:
    one = registrar(SHORT)
    await one.GetInfo(pb.InfoRequest(), CONTEXT)
    await notify(one, registered=True)
    await one.register(WatchStreams())
    await one.GetInfo(pb.InfoRequest(), CONTEXT)
    await notify(one, registered=True)
    await one.GetInfo(pb.InfoRequest(), CONTEXT)  # another kubelet
    with pytest.raises(CannotRegisterError, match="has not called GetInfo"):
        await one.register(WatchStreams())


async def test_a_new_socket_is_needed_if_the_kubelet_does_not_reconnect_on_its_own() -> None:
    one, streams = registrar(Timing(reconnect=0.01)), WatchStreams()
    assert await one.needs_new_socket(streams)
    streams.open()
    assert not await one.needs_new_socket(streams)
    streams.end()
    await one.GetInfo(pb.InfoRequest(), CONTEXT)
    assert not await one.needs_new_socket(streams)
    one = registrar(Timing(reconnect=60))
    waiting = asyncio.create_task(one.needs_new_socket(WatchStreams()))
    await asyncio.sleep(0)
    await one.GetInfo(pb.InfoRequest(), CONTEXT)
    assert not await waiting
