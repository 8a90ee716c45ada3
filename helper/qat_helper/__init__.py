"""The privileged process: a fixed table of operations, each checked by policy and audited."""
