"""asyncio's server on a Unix socket, without asyncio's removal of the socket's file.

Since Python 3.13 asyncio, and uvloop too, unlinks the name that the socket was bound to. The status socket is bound
through /proc/self/fd/N. At the end, descriptor N may refer to another file, so the lookup would fail with ENOTDIR and
end the server. Whoever creates a socket file removes it; a killed process leaves its file behind.
"""

import asyncio
import sys
from functools import partial

if sys.version_info >= (3, 13):
    start = partial(asyncio.start_unix_server, cleanup_socket=False)
else:
    start = asyncio.start_unix_server
