"""The server's process and its host: the sandbox that it enters, and the service manager that it notifies.

Only the process (process.py) calls this room.
"""
