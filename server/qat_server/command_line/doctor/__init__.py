"""`qat-plugin doctor`: reads the node, asks helper and server, and says in words what to do."""
