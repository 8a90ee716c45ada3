"""Log events: how the other rooms write them, and where klog's flags send them.

    from qat_server import logs
    log = logs.get(__name__)

Every room may call `get`; only the process configures the handler. An event is one line, whatever its fields hold.
"""

from qat_server.logs.logger import EventLogger, get

__all__ = ["EventLogger", "get"]
