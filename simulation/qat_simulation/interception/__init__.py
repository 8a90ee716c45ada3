"""Runs programs so that their writes beneath some directories are answered by a handler instead of the file system.

launch.py installs the seccomp filter and becomes the program, supervisor.py answers one program's writes, programs.py
runs a handler that may wait. A write elsewhere is not changed. This is no security boundary. The emulated kernel uses
it, and tests that run processes as other users or in containers.
"""
