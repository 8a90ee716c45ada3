"""`qat-plugin doctor`: observes the node, queries helper and server, and reports findings with advice.

Only the server's and the helper's existing interfaces are used; nothing on the node is changed. Run as any user: values
that cannot be read are treated as unknown.
"""
