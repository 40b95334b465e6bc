"""What losses are written with: distances, targets, pairs of views and their weights."""
