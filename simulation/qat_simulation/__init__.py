"""A node without hardware: an emulated kernel, an emulated kubelet and the demo that runs on both."""
