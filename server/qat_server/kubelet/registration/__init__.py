"""The two ways in which the kubelet learns of an endpoint, behind one protocol (`registrar`).

With `kubelet_socket` the helper calls Register on the kubelet's socket. With `plugin_watcher` the kubelet's plugin
watcher finds the endpoint's socket. `directories` defines where the sockets are in each case.
"""
