"""Flags, Settings and the commands of `qat-plugin`.

Owns every flag and its meaning, and what commands print on a terminal. Nothing below this room knows Settings: the
composition hands each part the values that it needs. Commands are imported only when one is called.
"""
