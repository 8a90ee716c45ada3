"""Provisioning of PFs: what the configuration wants (qat.conf, qat.toml), the plan to get there, its execution.

The plan is pure and made anew by each reconcile. A PF whose VFs are in use waits; a failure is that PF's own. Every
change of a device goes through the helper.
"""
