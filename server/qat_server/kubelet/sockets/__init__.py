"""Unix sockets for gRPC: servers whose path is always complete, and channels over a connected socket.

Owns the socket directory and the lock that lets only one server at a time use it.
"""
