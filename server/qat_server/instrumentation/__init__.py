"""Counters and conditions: plain numbers and sets, without a metrics library.

Every room above may count and report. `observability` turns the counters into metrics on each scrape.
"""
