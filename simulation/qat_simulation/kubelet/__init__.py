"""The emulated kubelet (v1.36): sockets, plugin registration, device manager, pod resources; and a ConfigMap's mount.

It owns a kubelet's directory. Any behaviour that a device plugin can observe is ported from the kubelet's source, its
faults included; the pods are only names. Others use kubelet.py, config_map.py and types of pods.py and topology.py.
From the top down: kubelet, plugins, the gRPC services and the plugin watcher, the device manager, the rest.
"""
