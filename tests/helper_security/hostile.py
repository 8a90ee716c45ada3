"""A hostile client's packets: requests of every kind, and mutations of them.

All packets come from one random number generator. A failing test shows its seed; QAT_FUZZ_SEED repeats it.
"""

import os
import random
from collections.abc import Callable
from typing import Final

import msgspec

from qat_shared.codec import encode
from qat_shared.messages import (
    MAX_MESSAGE,
    PROTOCOL,
    AnyRequest,
    BindDriver,
    DpdkDriver,
    Hello,
    OpenPodResources,
    PrepareSocketDirectory,
    ReadDeviceConfig,
    ReadHeartbeat,
    RegisterResource,
    ReleaseDriver,
    Service,
    SetAutoReset,
    SetNumVfs,
    SetPmIdle,
    SetServices,
    SocketDirectory,
)
from qat_shared.pci import PciAddress

_EDGES: Final = (0, 1, -1, 127, 128, 255, 256, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, -(2**63))
_WORDS: Final = (
    "",
    "../../etc/shadow",
    "vfio-pci",
    "BindDriver",
    "op",
    "id",
    "address",
    "\0",
    "\ud7ff",
    "x" * 201,
    "𝄞",
)
_PIECES: Final = (
    b"",
    b"\0",
    b"\xff",
    b"\xc0",
    b"\xdf\xff\xff\xff\xff",
    b"\xdd\xff\xff\xff\xff",
    b"\xdb\x7f\xff\xff\xff",
)


def seeded() -> tuple[int, random.Random]:
    """A seed and its generator."""
    seed = int(os.environ.get("QAT_FUZZ_SEED") or random.SystemRandom().getrandbits(32))
    return seed, random.Random(seed)  # noqa: S311  not a secret


def address(dice: random.Random) -> PciAddress:
    """The test node's PF or a VF, or any other address."""
    if dice.random() < 0.7:
        return PciAddress(0, 0x6B, 0, dice.randrange(3))
    return PciAddress(dice.getrandbits(32), dice.getrandbits(8), dice.getrandbits(5), dice.getrandbits(3))


REQUESTS: Final[dict[type[AnyRequest], Callable[[random.Random, int, str], AnyRequest]]] = {
    Hello: lambda dice, n, why: Hello(id=n, reason=why, protocol=dice.choice((PROTOCOL, 0, 2**31)), version=why[:40]),
    BindDriver: lambda dice, n, why: BindDriver(
        id=n, reason=why, address=address(dice), driver=dice.choice(list(DpdkDriver))
    ),
    ReleaseDriver: lambda dice, n, why: ReleaseDriver(id=n, reason=why, address=address(dice)),
    ReadHeartbeat: lambda dice, n, why: ReadHeartbeat(id=n, reason=why, address=address(dice)),
    ReadDeviceConfig: lambda dice, n, why: ReadDeviceConfig(id=n, reason=why, address=address(dice)),
    SetServices: lambda dice, n, why: SetServices(
        id=n, reason=why, address=address(dice), services=tuple(dice.choices(list(Service), k=dice.randrange(1, 4)))
    ),
    SetPmIdle: lambda dice, n, why: SetPmIdle(
        id=n, reason=why, address=address(dice), on=dice.random() < 0.5, stay_down=dice.random() < 0.5
    ),
    SetAutoReset: lambda dice, n, why: SetAutoReset(id=n, reason=why, address=address(dice), on=dice.random() < 0.5),
    SetNumVfs: lambda dice, n, why: SetNumVfs(
        id=n, reason=why, address=address(dice), count=dice.choice((0, 1, 2, 16, 0xFFFF))
    ),
    PrepareSocketDirectory: lambda dice, n, why: PrepareSocketDirectory(
        id=n, reason=why, directory=dice.choice(list(SocketDirectory))
    ),
    OpenPodResources: lambda dice, n, why: OpenPodResources(id=n, reason=why, wait_ms=dice.choice((0, 0, 0, 1, 50))),
    RegisterResource: lambda dice, n, why: RegisterResource(
        id=n,
        reason=why,
        resource=dice.choice(("qat.intel.com/cy", "qat.intel.com/generic", "nvidia.com/gpu", "qat.intel.com/x")),
        endpoint=dice.choice(("cy.sock", "generic.sock", "a.sock")),
        wait_ms=dice.choice((0, 0, 0, 1, 50)),
    ),
}
"""For each kind of request, a factory (generator, id, reason). test_fuzzing.py fails if a kind is missing."""


def request(dice: random.Random) -> AnyRequest:
    """A valid request."""
    why = "".join(dice.choice(" ;|=#'~az") for _ in range(dice.randrange(65)))
    return dice.choice(list(REQUESTS.values()))(dice, dice.getrandbits(32), why)


def packet(dice: random.Random) -> bytes:
    """A packet: sometimes a request, mostly a mutated or similar one, or random bytes."""
    return dice.choices((_whole, _changed, _odd_fields, _noise, _huge), (15, 50, 25, 9, 1))[0](dice)


def _whole(dice: random.Random) -> bytes:
    return encode(request(dice))


def _changed(dice: random.Random) -> bytes:
    data = bytearray(_whole(dice))
    for _ in range(dice.choice((1, 1, 1, 2, 5))):
        at = dice.randrange(len(data) + 1)
        how = dice.randrange(4)
        if how == 0 and at < len(data):
            data[at] ^= 1 << dice.randrange(8)
        elif how == 1:
            del data[at : at + dice.randrange(1, 8)]
        elif how == 2:
            data[at:at] = dice.choice(_PIECES) or dice.randbytes(3)
        else:
            other = _whole(dice)
            data[at:] = other[dice.randrange(len(other)) :]
    return bytes(data)


def _odd_fields(dice: random.Random) -> bytes:
    fields: dict[object, object] = msgspec.msgpack.decode(_whole(dice))
    for _ in range(dice.randrange(1, 3)):
        name = dice.choice([*fields, "path", "op", 0, None, "x" * 300])
        if dice.random() < 0.2:
            fields.pop(name, None)
        else:
            fields[name] = _value(dice, 3)
    return msgspec.msgpack.encode(fields)


def _value(dice: random.Random, depth: int) -> object:
    kind = dice.randrange(8 if depth else 6)
    if kind == 0:
        return dice.choice(_EDGES)
    if kind == 1:
        return dice.choice(_WORDS)
    if kind == 2:
        return dice.choice((None, True, False, 0.5, float("nan"), float("inf")))
    if kind == 3:
        return dice.randbytes(dice.randrange(6))
    if kind == 4:
        return msgspec.msgpack.Ext(dice.randrange(-128, 128), dice.randbytes(4))
    if kind == 5:
        return [0, 0x6B, 0, dice.choice(_EDGES)]
    if kind == 6:
        return [_value(dice, depth - 1) for _ in range(dice.randrange(5))]
    return {dice.choice(_WORDS): _value(dice, depth - 1) for _ in range(dice.randrange(4))}


def _noise(dice: random.Random) -> bytes:
    return dice.randbytes(dice.choice((0, 1, 5, 40, 300)))


def _huge(dice: random.Random) -> bytes:
    size = dice.choice((MAX_MESSAGE - 1, MAX_MESSAGE, MAX_MESSAGE + 1, 3 * MAX_MESSAGE))
    return dice.choice((b"\x91", b"\x81", b"\xc0", b"\xdf")) * size
