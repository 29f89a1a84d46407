"""The Triton kernels, installed as ``fastkd.kernels``: ``distill`` (two passes), ``stream`` (one), ``launch`` (ops)."""
