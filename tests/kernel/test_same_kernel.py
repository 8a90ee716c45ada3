"""The emulated kernel answers as the real one does: the same steps on both, and the same seen."""

import pytest

from kernel.cases import CASES
from kernel.real_kernel import real_kernel
from kernel.steps import Case, Seen, differences, emulated_uevents, kernel_uevents, observe
from support.emulated_kernel import emulated


def compare(case: Case) -> Seen:
    """Both kernels do the same; what the real one showed."""
    with emulated(case.node) as kernel, emulated_uevents(kernel, case.watched[0]) as uevents:
        ours = observe(kernel, case, uevents)
    with kernel_uevents() as uevents, real_kernel(case.node) as real:
        theirs = observe(real, case, uevents, like=ours)
    if found := differences(ours, theirs):
        pytest.fail("\n".join(found), pytrace=False)
    return theirs


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_both_do_the_same(case: Case) -> None:
    compare(case)
