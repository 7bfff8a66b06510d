"""Triton kernels, one file per operation; ``common.py`` and ``linear.py`` hold what they share."""
