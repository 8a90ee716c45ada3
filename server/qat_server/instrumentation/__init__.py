"""What the rooms count, and the conditions that they report: plain numbers and sets, without a metrics library.

Every room above may count and report. `observability` turns the counters into metrics when somebody scrapes them.
"""
