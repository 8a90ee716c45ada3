"""Lines of all levels to be logged, and what was logged in a text."""

import logging
import re

from qat_server import logs

log = logs.get("qat_server.somewhere")


def say_everything() -> None:
    log.error("an error", n=1)
    log.warning("a warning")
    log.info("an info")
    log.v(1, "a detail")
    log.v(4, "more detail")
    logging.getLogger("qat_server.elsewhere").debug("a debug line", extra={"fields": {"n": 1}})


def messages(text: str) -> list[str]:
    return re.findall(r'\] "([^"]*)"', text)
