"""The grammar of flag values: durations, numbers, addresses, and the phrase for a text that is not one."""

from collections.abc import Callable

import pytest

from qat_server.parsing.values import HostPort, duration, host_port, vmodule
from qat_shared.values import integer

GOOD: dict[str, tuple[Callable[[], object], object]] = {
    "plain seconds": (lambda: duration("5", 0.01), 5.0),
    "fraction": (lambda: duration("0.5", 0.01), 0.5),
    "milliseconds": (lambda: duration("500ms", 0.01), 0.5),
    "mixed": (lambda: duration("1h2m3.5s", 0.01), 3723.5),
    "off with a unit": (lambda: duration("0s", 0.01, zero_is_off=True), 0.0),
    "IPv6": (lambda: host_port("[::1]:9090"), HostPort("::1", 9090)),
    "name": (lambda: host_port("node-1.example.com:80"), HostPort("node-1.example.com", 80)),
    "everywhere": (lambda: host_port(":9090"), HostPort("", 9090)),
    "vmodule, level 0": (lambda: vmodule("discovery=4,sim*=2,x=0,"), (("discovery", 4), ("sim*", 2))),
}


@pytest.mark.parametrize(("parse", "expected"), GOOD.values(), ids=GOOD)
def test_good(parse: Callable[[], object], expected: object) -> None:
    assert parse() == expected


BAD: dict[str, tuple[Callable[[str], object], str, str]] = {
    "minus one": (lambda text: integer(text, 1), "-1", "-1 is too small"),
    "Python's number": (integer, "1_000", "not a whole number"),
    "digits of another script": (integer, "٣", "not a whole number"),
    "very large number": (integer, "9" * 19, "is too large"),
    "huge number": (integer, "9" * 5000, "is not a whole number"),
    "port too large": (host_port, "localhost:65536", "the port is 0 to 65535"),
    "port a word": (host_port, "localhost:http", "not an address"),
    "IPv6 without brackets": (host_port, "::1:9090", "must be in brackets"),
    "no IPv6": (host_port, "[fe80::zz]:9090", "is not an IPv6 address"),
    "URL": (host_port, "http://x:80", "is not a host name or address"),
    "host with a space": (host_port, "a b:80", "is not a host name"),
    "negative duration": (lambda text: duration(text, 0.01), "-5s", "is not a duration"),
    "unit alone": (lambda text: duration(text, 0.01), "s", "is not a duration"),
    "not a number": (lambda text: duration(text, 0.01), "nan", "is not a duration"),
    "too long": (lambda text: duration(text, 0.01), "25h", "too long, the maximum is 24h"),
    "vmodule with a word": (vmodule, "discovery=x", "is not pattern=N"),
    "vmodule negative": (vmodule, "discovery=-1", "is not pattern=N"),
}


@pytest.mark.parametrize(("parse", "text", "phrase"), BAD.values(), ids=BAD)
def test_bad(parse: Callable[[str], object], text: str, phrase: str) -> None:
    with pytest.raises(ValueError, match=r".+") as caught:
        parse(text)

    sentence = str(caught.value)
    assert phrase in sentence
    assert "\n" not in sentence
    assert len(sentence) < 400
