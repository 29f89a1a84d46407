"""fastkd in trainers of others, one module each, which imports that trainer."""
