"""The QAT devices of the node: sysfs in, an immutable Inventory out, and the events that change it.

Owns discovery, resource names, PF health, uevents and the change queue. Reads sysfs and never writes to it; what root
must read (heartbeat, dev_cfg) comes through the helper client. A device that cannot be read becomes a Problem, and
the others are unaffected.
"""
