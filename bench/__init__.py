"""Benchmarks: one file per operation and the whole upsampler, each behind an accuracy gate."""
