"""The server's process and its host: the sandbox that it enters, the service manager that it notifies."""
