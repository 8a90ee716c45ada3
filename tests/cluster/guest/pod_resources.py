"""In the guest: ask the kubelet what it may allocate of QAT, and who has what of it, by its PodResources service.

pod_resources.py [RESOURCE=NUMBER]     prints JSON; with a wish, asks until so many are allocatable
pod_resources.py --watch RESOURCE      a line at each change, until it is ended: seconds, how many are allocatable
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterable
from typing import Any, Final

import grpc

from qat_server.kubelet.generated import podresources_v1_pb2 as pb
from qat_server.kubelet.generated.podresources_v1_pb2_grpc import PodResourcesListerStub

SOCKET: Final = "unix:/var/lib/kubelet/pod-resources/kubelet.sock"
LIMIT: Final = 300.0


def answer() -> dict[str, Any]:
    """`allocatable`: ids by resource; `pods`: by pod, container and resource, ids."""
    with grpc.insecure_channel(SOCKET) as channel:
        stub = PodResourcesListerStub(channel)
        allocatable = stub.GetAllocatableResources(pb.AllocatableResourcesRequest(), wait_for_ready=True, timeout=LIMIT)
        listed = stub.List(pb.ListPodResourcesRequest(), wait_for_ready=True, timeout=LIMIT)
        pods: dict[str, Any] = {}
        for pod in listed.pod_resources:
            for container in pod.containers:
                pods.setdefault(pod.name, {})[container.name] = _ids(container.devices)
        return {"allocatable": _ids(allocatable.devices), "pods": pods}


def _ids(devices: Iterable[Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in devices:
        if entry.resource_name.startswith("qat.intel.com/"):
            found.setdefault(entry.resource_name, []).extend(entry.device_ids)
    return {name: sorted(ids) for name, ids in sorted(found.items())}


def watch(resource: str) -> None:
    """How many are allocatable, whenever that has changed; 0 while the kubelet does not answer."""
    last = -1
    while True:
        now = 0
        with contextlib.suppress(grpc.RpcError):
            now = len(answer()["allocatable"].get(resource, []))
        if now != last:
            print(f"{time.monotonic():.1f} {now}", flush=True)
            last = now
        time.sleep(0.5)


def main() -> None:
    if sys.argv[1:2] == ["--watch"]:
        watch(sys.argv[2])
    resource, _, number = (sys.argv[1] if sys.argv[1:] else "").partition("=")
    deadline = time.monotonic() + LIMIT
    while True:
        try:
            found = answer()
            if not resource or len(found["allocatable"].get(resource, [])) == int(number):
                print(json.dumps(found))
                return
        except grpc.RpcError as error:  # the kubelet has been killed, for one
            found = {"error": str(error)}
        if time.monotonic() > deadline:
            sys.exit(f"{resource}={number} has not come: {json.dumps(found)}")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
