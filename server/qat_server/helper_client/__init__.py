"""The server's only way to the helper: one connection, typed calls, and the retries of failed operations.

Owns the connection, the state of the helper (version, sandbox, head of its audit log) and the backoff by device. While
there is no connection, a call fails at once with HelperUnavailableError. No other room opens the helper's socket; every
room above may make calls.
"""
