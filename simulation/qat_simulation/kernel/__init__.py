"""The emulated kernel: a tree that looks like sysfs, the PCI bus with its drivers behind it, and uevents.

It owns the tree and its state: only the methods of `Kernel` and intercepted writes change them. A write gets the real
kernel's bytes, errno or wait (docs/simulation.md has the table). Others use kernel.py, and `OpenVfio`; from the top
down the room consists of kernel, stores and hardware, drivers, bus, sysfs and model.
"""
