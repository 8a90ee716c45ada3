"""Pure parsers of the values in flags and configuration files.

Each raises ValueError with one phrase that names the valid form. `command_line` and `provisioning` use them.
"""
