"""Measurements: `python -m benchmarks.NAME` from a checkout. Results that matter are in benchmarks/records/.

`common.py` says how everything is measured, `contestants.py` who is compared with and how to install them; whoever is
not installed is left out, by name.
"""
