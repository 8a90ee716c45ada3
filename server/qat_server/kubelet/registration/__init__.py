"""The two ways in which the kubelet learns of an endpoint, behind one protocol (`registrar`).

`kubelet_socket` calls Register on the kubelet's socket; `plugin_watcher` is found by the kubelet's plugin watcher.
`directories` says where the endpoints' sockets are for each.
"""
