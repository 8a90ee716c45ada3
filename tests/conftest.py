"""Before any test module is imported: gRPC stays out of fork().

The helper forks a child for each operation, and some tests do so within pytest, where gRPC is loaded too. Its fork
handlers would stop its threads in the parent and abort the child; neither is wanted by a child that never uses gRPC.
"""

import os

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
