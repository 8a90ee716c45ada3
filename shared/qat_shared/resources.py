"""The resource names: one for each set of services that a PF can have. No other name is ever registered.

The words are those of the kernel's qat/cfg_services, in the order of its adf_cfg_services.c.
"""

from collections.abc import Collection
from itertools import combinations
from typing import Final

from qat_shared import NAMESPACE

GENERIC: Final = "generic"
CRYPTO: Final = "cy"

SERVICES: Final = ("asym", "sym", "dc", "decomp", "dcc")
"""All services, in the order of the words in a name."""


def name_of(services: Collection[str]) -> str:
    """The name for a set of services, in any order, without the namespace."""
    name = "-".join(service for service in SERVICES if service in services)
    return CRYPTO if name == "asym-sym" else name


RESOURCES: Final = frozenset(
    f"{NAMESPACE}/{name}"
    for name in (GENERIC, *(name_of(words) for count in range(1, 6) for words in combinations(SERVICES, count)))
)
"""The full names of all resources: 32."""
