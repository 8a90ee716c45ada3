"""The unprivileged process: discovery, allocation, the kubelet, health, metrics and the command line."""
