"""Binding VFs to the wanted driver: which to bind (a pure plan), and the operations in progress.

One operation for one VF at a time, a bounded number in all, each through the helper. A failure is that VF's own and is
tried again with backoff. A VF that somebody else bound to another driver is left alone.
"""
