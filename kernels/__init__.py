"""Home of the Triton kernels (shipped as ``fastkd.kernels``); the CPU kernels are in ``csrc/cpu``."""
