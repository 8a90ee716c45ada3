"""Pure parsers of the texts that people write in flags and configuration files.

Each raises ValueError with one phrase that says what would be right. Durations, booleans and numbers are read as Go's
flag package reads them.
"""
