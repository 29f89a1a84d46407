"""The implementation of the loss: options and tensors of a call, ops, backends and the reference."""
