"""A broken kubelet (the emulated one, since the real one cannot be told to be): it is said, tried again, and mended.

One that hangs takes long; tests/node/test_endpoint.py has it, with shorter time-outs, and the pauses between attempts.
"""

import pytest

from kubelet.either import EmulatedKubelet
from kubelet.nodes import CY, ONE_PF
from kubelet.production import node_directory, on_kubelet
from qat_simulation.kubelet.kubelet import Hostility

SAID = {
    Hostility.REFUSE: "is not supported by kubelet",
    Hostility.NO_STREAM: "did not open a ListAndWatch stream",
    Hostility.END_STREAM: "ended the ListAndWatch stream",
    Hostility.CLOSE: "the kubelet closed the connection",
    Hostility.GARBAGE: "the kubelet closed the connection",
}


@pytest.mark.parametrize("hostility", SAID)
async def test_a_broken_kubelet(hostility: Hostility) -> None:
    with node_directory() as directory:
        kubelet = EmulatedKubelet(directory / "kubelet")
        kubelet.kubelet.hostility = hostility
        async with on_kubelet(ONE_PF, directory, kubelet) as node:
            node.start_helper()
            node.start_server()
            status = await node.until_status(
                "it is said", lambda s: any(SAID[hostility] in resource.error for resource in s.resources)
            )
            assert not status.ready
            kubelet.kubelet.hostility = Hostility.NONE
            await kubelet.restart()
            await node.wait({CY: 4})
            said = [line for line in node.log("server").splitlines() if "cannot register with the kubelet" in line]
            assert sum(SAID[hostility] in line for line in said) <= 1, "once, however often it is tried"
            pod = await kubelet.allocate("pod", [("main", CY, 4)])
            assert len(pod.devices) == 4
