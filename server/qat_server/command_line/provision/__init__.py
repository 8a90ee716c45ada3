"""`qat-plugin provision` and `qat-plugin config check`: a plan that is shown, and carried out once.

Both use the plan and the steps of the running server (the room provisioning).
"""
