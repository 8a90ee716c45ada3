"""Everything between the server and the kubelet: what it is offered, what it allocates, what its pods hold.

Owns the listing, one endpoint for each resource, allocation, both ways to register (`registration/`), the sockets of
all these (`sockets/`) and the generated protocol (`generated/`). No other room speaks to the kubelet.
A device does not leave a listing before the kubelet says that no pod holds it.
"""
