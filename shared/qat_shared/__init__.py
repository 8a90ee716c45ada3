"""What the helper and the server both know: messages, codec, device table, PCI addresses, sysfs readers.

Nothing here writes. It runs as root too: the standard library and msgspec only.
"""

VERSION = "0.1.0"
