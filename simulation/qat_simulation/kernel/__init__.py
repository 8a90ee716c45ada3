"""The emulated kernel: a tree that looks like sysfs, the PCI bus with its drivers behind it, and uevents.

It owns the tree and its state: only the methods of `Kernel` and intercepted writes change them. A write gets the real
kernel's bytes, errno or wait (docs/simulation.md has the table). Others use kernel.py, and `OpenVfio`; from the top
down the room consists of kernel, then stores (what a write to an attribute does), hardware, faults and vfio_files, then
device_stores, drivers, bus, sysfs with uevents, and model.
"""
