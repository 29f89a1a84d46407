"""What people look at: predictions, maps of a run, and the demo."""
