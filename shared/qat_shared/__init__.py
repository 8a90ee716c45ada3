"""Shared by helper and server: messages and codec, device table, PCI addresses, sysfs readers, self-confinement.

Nothing here writes to a device. This code also runs as root, so it imports only the standard library and msgspec.
"""

VERSION = "0.1.0"

NAMESPACE = "qat.intel.com"
"""The prefix of every resource name, before the slash, and the name of the directories for the server's sockets."""

SUN_PATH_LIMIT = 107
"""The longest Unix socket path in bytes (sockaddr_un, unix(7)), without the terminating NUL."""
