"""The plan as a table: actual state, desired state, the steps now and later, and the holders of VFs."""

from qat_server.command_line.provision.plan_table import row
from qat_server.devices.inventory import Inventory
from qat_server.provisioning.plan import PfPlan, plan
from qat_shared.pci import PciAddress
from support.provisioning_plans import AT, VFS, a_pf, a_state, configured, plan_of


def test_table() -> None:
    def cells(one: PfPlan) -> tuple[str, ...]:
        planned = plan(Inventory((one.pf,), (), (), ()), {AT: a_state()}, configuration, holders)
        (pf_plan,) = planned.pfs
        name, *found = row(pf_plan)
        assert name == f"0000:6b:00.0 ({one.pf.device_id:04x})"
        return tuple(found)

    now = "asym;sym, auto-reset off, pm-idle on, 2 of 2 VFs"
    holders: dict[PciAddress, str] = {}
    configuration = configured("dc", True)
    one = plan_of(a_pf(), a_state(), configuration)
    assert cells(one) == (now, "dc, auto-reset on, all VFs", "auto-reset on, services dc, 2 VFs", "")
    holders = dict.fromkeys(VFS, "default/crypto/main")
    expected = "auto-reset on, when free: services dc, 2 VFs"
    assert cells(one) == (now, "dc, auto-reset on, all VFs", expected, "default/crypto/main")
    configuration = configured(vfs=0, pm_idle=True)
    assert cells(one) == (now, "pm-idle on, no VFs", "when free: no VFs", "default/crypto/main")
    configuration = configured()
    assert cells(one) == (now, "all VFs", "none", "")
    configuration = configured("decomp")
    assert cells(one)[2] == "impossible: decomp (qat.conf line 1): only Gen6 devices (4948) support decomp"
