"""`qat-plugin demo`: the plugin's main job, shown on a simulated node by the real helper and server.

Each step changes the node, waits until the expected effect is observed (never for a fixed time), and prints it. A step
that the node does not allow is reported as skipped. The exit status is 0 only if every other step succeeded and every
VF that should be bound is. sequence.py has the order of the steps, startup.py and events.py the steps, demo_run.py the
state that they share. `--keep` continues in interactive.py. entry_points.py and tests of the images use it.
"""
