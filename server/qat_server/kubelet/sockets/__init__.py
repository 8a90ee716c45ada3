"""Unix sockets for gRPC: servers at a path that is never half-made, channels over a connected socket, the directory.

Owns the socket directory and the lock that lets one server at a time work in it.
"""
