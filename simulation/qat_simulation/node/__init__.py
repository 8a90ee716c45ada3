"""The description of a simulated node: its devices, drivers and settings, and the services that a QAT device accepts.

description.py checks a description (a JSON file, or `Node` in code); all other rooms trust it. Pure: nothing here
makes a file. Any module may use it.
"""
