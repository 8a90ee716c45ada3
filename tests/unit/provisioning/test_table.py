"""The plan as a table: what is, what is wanted, what is done now and later, who is waited for."""

from qat_server.devices.inventory import Inventory
from qat_server.provisioning.plan import (
    PfPlan,
    plan,
)
from qat_server.provisioning.table import rows
from qat_shared.pci import PciAddress
from support.provisioning_plans import AT, VFS, a_pf, a_state, plan_of, wishes


def test_table() -> None:
    def row(one: PfPlan) -> tuple[str, str, str, str]:
        (found,) = rows(plan(Inventory((one.pf,), (), (), ()), {AT: a_state()}, wants, holders))
        assert found.pf == f"0000:6b:00.0 ({one.pf.device_id:04x})"
        return (found.now, found.wanted, found.steps, found.held_by)

    now = "asym;sym, auto-reset off, pm-idle on, 2 of 2 VFs"
    holders: dict[PciAddress, str] = {}
    wants = wishes("dc", True)
    one = plan_of(a_pf(), a_state(), wants)
    assert row(one) == (now, "dc, auto-reset on, all VFs", "auto-reset on, services dc, 2 VFs", "")
    holders = dict.fromkeys(VFS, "default/crypto/main")
    expected = "auto-reset on, when free: services dc, 2 VFs"
    assert row(one) == (now, "dc, auto-reset on, all VFs", expected, "default/crypto/main")
    wants = wishes(vfs=0, pm_idle=True)
    assert row(one) == (now, "pm-idle on, no VFs", "when free: no VFs", "default/crypto/main")
    wants = wishes()
    assert row(one) == (now, "all VFs", "none", "")
    wants = wishes("decomp")
    assert row(one)[2] == "impossible: decomp (qat.conf line 1): only Gen6 devices (4948) have decomp"
