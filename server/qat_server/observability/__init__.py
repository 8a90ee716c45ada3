"""The server's readiness, /status and metrics, and the HTTP server for them.

Readiness, status and most metrics are functions of one immutable State, which the composition root collects from the
other rooms; the other metrics come from the Counters. Nothing in this room changes a device or what the kubelet sees.
"""
