"""The Triton kernels (shipped as ``fastkd.kernels``): ``distill`` two passes, ``stream`` one, ``launch`` their ops."""
