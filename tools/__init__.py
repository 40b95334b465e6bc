"""Small programs that are run from a checkout: `python -m tools.NAME`."""
