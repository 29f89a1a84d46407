"""The training loop: configuration, objective, evaluation and what a run writes."""
