"""Log events: the loggers of the other rooms, and the handler that klog's flags configure.

    from qat_server import logs
    log = logs.get(__name__)

Every room may call `get`; only `main` configures the handler. An event is always one line, whatever its fields contain.
"""

from qat_server.logs.logger import get

__all__ = ["get"]
