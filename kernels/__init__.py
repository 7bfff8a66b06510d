"""Triton kernels, one file per operation, with the same basenames as ``vitup_fast.ops``."""
