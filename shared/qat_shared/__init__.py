"""What the helper and the server both know: messages, codec, device table, PCI addresses, sysfs readers.

Nothing here writes. It runs as root too: the standard library and msgspec only.
"""

VERSION = "0.1.0"

NAMESPACE = "qat.intel.com"
"""Stands before each resource's name, with a slash; and the name of the directories for the server's sockets."""

SUN_PATH_LIMIT = 107
"""Bytes of a Unix socket's path that fit into sockaddr_un (unix(7)), the closing NUL not counted."""
