"""Output for people: predictions, maps of a run, and the demo."""
