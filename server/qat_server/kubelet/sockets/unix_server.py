"""asyncio's server on a Unix socket, which leaves the socket's file to whoever made it.

Since Python 3.13 asyncio (uvloop too) looks up the name that the socket was bound to, and unlinks it at the end.
The status socket is bound by /proc/self/fd/N (grpc_socket.py), and descriptor N may be another file's by then: the look
fails with ENOTDIR, and the server ends. A name is removed by who made it; a killed process leaves its own behind.
"""

import asyncio
import sys
from functools import partial

if sys.version_info >= (3, 13):
    start = partial(asyncio.start_unix_server, cleanup_socket=False)
else:
    start = asyncio.start_unix_server
