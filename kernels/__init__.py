"""The Triton kernels (shipped as ``fastkd.kernels``): ``distill`` the kernels, ``launch`` the ops that run them."""
