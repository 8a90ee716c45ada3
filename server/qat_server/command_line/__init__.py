"""The flags, the Settings and the commands of `qat-plugin`.

Owns every flag and its meaning, and everything that the commands print on a terminal. Rooms below this one do not know
Settings: the composition root passes each part the values that it needs. The application module is imported only to run
a command or to show help, and each command imports what it needs when it runs.
"""
