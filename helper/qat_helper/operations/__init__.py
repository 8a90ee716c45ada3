"""The operations: `table` has one row for each, the other modules carry them out.

They run in short-lived child processes. Each checks what only the device can show, and reads back what it wrote. Only
`writing` writes to sysfs. The dispatcher alone starts an operation.
"""
