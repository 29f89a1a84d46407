"""The training loop: configuration, objective, evaluation, log and plots of a run."""
