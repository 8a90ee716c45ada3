"""Provisioning of PFs: what the configuration wants (qat.conf, qat.toml), and the plan that leads there."""
