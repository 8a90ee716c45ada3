"""Provisioning of PFs: the desired state (qat.conf, qat.toml), the plan that leads to it, and its execution.

The plan is pure and is recomputed by each reconcile from the desired state and the actual state of each PF. A PF whose
VFs are in use waits, and a failure affects only its own PF. Every change of a device goes through the helper.

The reconciler calls the Provisioner; the `provision` and `config check` commands use the plan and its execution.
"""
