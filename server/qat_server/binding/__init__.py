"""Binds VFs to the wanted driver: a pure plan of which VFs to bind, and the operations in progress.

Each operation goes through the helper: one at a time for each VF, and a bounded number in all. A failure affects only
its VF and is retried with backoff. A VF that was bound to another driver by somebody else is left alone. The reconciler
calls the plan and the binder; `apparmor` is also used by the doctor.
"""
