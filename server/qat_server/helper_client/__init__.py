"""The server's only way to the helper: one connection, typed calls, and the retries of failed operations.

Owns the connection, what is known of the helper (version, sandbox, head of its audit log) and the backoff by device.
A call fails at once with HelperUnavailableError while there is no connection. No other room opens the helper's socket.
"""
