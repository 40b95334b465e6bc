"""The configuration of a run: its fields, the command line, named recipes."""
