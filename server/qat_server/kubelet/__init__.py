"""All communication with the kubelet: listing, allocation, registration, and the devices that pods hold.

Owns the listing, one endpoint for each resource, allocation, both ways to register (`registration/`), their Unix
sockets (`sockets/`) and the generated protocol (`generated/`). No other room speaks to the kubelet.
Guarantee: a device leaves a listing only after the kubelet has reported that no pod holds it.
`Endpoints.releasable` is that decision. The reconciler uses `listing` and `endpoints`, provisioning uses `usage`.
"""
