"""A snapshot of the server, collected from all rooms by composition.py (`Server.state`).

Readiness, /status and the metrics are functions of one `State`, so they cannot disagree.
"""

from collections.abc import Mapping

from msgspec import Struct

from qat_server.devices.inventory import Inventory
from qat_server.helper_client.client import HelperState
from qat_server.kubelet.device import Listing
from qat_server.kubelet.endpoint import EndpointState
from qat_server.provisioning.progress import Progress
from qat_shared.pci import PciAddress


class State(Struct, frozen=True, kw_only=True):
    """A snapshot. `unhealthy`, `heartbeats`, `provisioning` and `working` have addresses of PFs, the others of VFs.

    `waits_for`: why the server does not serve yet, "" if it does. `names`: the resource of each VF. `unhealthy`: why a
    PF is unhealthy. `heartbeats`: whether a PF answered its last query. `foreign`: the driver that a VF was bound to
    outside the plugin. `failures`: why a VF could not be bound. `held`: the pod that holds a VF. `holders_unknown`: why
    it is not known which devices pods hold, "" if it is known. `working`: PFs that are being provisioned.
    `configured`: a provisioning configuration is in force, or none is required. `sandbox`: missing part of each layer.
    """

    inventory: Inventory
    waits_for: str = ""
    listing: Listing = {}
    names: Mapping[PciAddress, str] = {}
    unhealthy: Mapping[PciAddress, str] = {}
    heartbeats: Mapping[PciAddress, bool] = {}
    endpoints: Mapping[str, EndpointState] = {}
    helper: HelperState = HelperState()
    foreign: Mapping[PciAddress, str] = {}
    failures: Mapping[PciAddress, str] = {}
    held: Mapping[PciAddress, str] = {}
    holders_unknown: str = ""
    provisioning: Mapping[PciAddress, Progress] = {}
    working: tuple[PciAddress, ...] = ()
    configured: bool = True
    provisioning_error: str = ""
    uevents: int = 0
    uevent_overruns: int = 0
    sandbox: Mapping[str, str] = {}
