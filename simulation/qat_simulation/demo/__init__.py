"""`qat-plugin demo`: the main job, shown on a simulated node by the real helper and server.

Each step does something to the node, waits until it is *seen* to have the effect that it should (never for a time), and
prints what was seen. What a node does not allow to be shown is said, not claimed. The exit status is 0 only when every
step was seen and no VF that should have been bound was not.
"""
