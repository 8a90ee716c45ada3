"""The names of the VFs' resources, and the dev_cfg of PFs whose names depend on it, which only the helper can read."""

from qat_server import naming
from qat_server.facts import Facts
from qat_server.helper_client import HelperClient, HelperError, HelperUnavailableError
from qat_server.inventory import Inventory
from qat_shared.messages import ErrorCode
from qat_shared.pci import PciAddress


class DeviceConfigs:
    """`read`, then `names`."""

    def __init__(self, helper: HelperClient, facts: Facts) -> None:
        self._helper = helper
        self._facts = facts
        self._configs: dict[PciAddress, str] = {}

    async def read(self, inventory: Inventory) -> None:
        """Ask for the dev_cfg of PFs that need one for their name and have none yet."""
        needed = {pf.address for pf in inventory.pfs if naming.needs_config(pf)}
        self._configs = {address: text for address, text in self._configs.items() if address in needed}
        for address in sorted(needed - self._configs.keys()):
            try:
                self._configs[address] = (await self._helper.device_config(address)).text
            except HelperUnavailableError:
                return  # asked again when it is back
            except HelperError as error:
                if error.code in (ErrorCode.UNAVAILABLE, ErrorCode.DENIED):
                    self._configs[address] = ""  # this driver has none, or it is not for us to know
                else:
                    self._facts.say("services not read", address=address, why=error.message)

    def names(self, inventory: Inventory) -> dict[PciAddress, str]:
        """Resource by VF; without a VF whose PF's dev_cfg is needed and cannot be read yet."""
        pfs = {pf.address: pf for pf in inventory.pfs}
        names = {}
        for vf in inventory.vfs:
            pf = pfs.get(vf.pf) if vf.pf is not None else None
            config = self._configs.get(pf.address) if pf is not None else None
            if config is not None or pf is None or not naming.needs_config(pf):
                names[vf.address] = naming.resource_name(vf, pf, config)
        return names
