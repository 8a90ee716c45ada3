"""The audit log: its hash-chained files (`log`), and copies of its lines for a log collector (`copies`).

The serving process alone writes it: a line before and a line after each operation that is recorded.
"""
