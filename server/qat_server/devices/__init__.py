"""The QAT devices of the node: sysfs in, an immutable Inventory out, and the events that change it.

Owns discovery, resource names, PF health, uevents and the change queue. It reads sysfs and never writes to it; the
files that only root can read (heartbeat, dev_cfg) come through the helper client. A device that cannot be read becomes
a Problem and does not affect the others. The composition root, the reconciler and the rooms above may use it.
"""
