"""The loss below its public functions: options and tensors of a call, ops, backends and the reference."""
