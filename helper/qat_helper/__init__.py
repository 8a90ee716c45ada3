"""The root process: a fixed table of operations, each checked by policy and recorded in the audit log.

operations/table.py is the table: nothing outside it can be requested. Only the server's uid may connect. No request
holds a path or bytes to write. An operation that changes something or passes a descriptor has an audit line before and
after it. The server imports nothing from here; it sends the messages of qat_shared over one Unix socket.
"""
