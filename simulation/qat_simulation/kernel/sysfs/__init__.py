"""The part of sysfs that processes read: the files on disk (tree.py), and which attributes they are (attributes.py).

Only the bus and the modules above it write here; what happens on a write is decided there.
"""
