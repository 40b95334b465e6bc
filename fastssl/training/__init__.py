"""Views to weights: the loop, its step, and what a run leaves behind."""
