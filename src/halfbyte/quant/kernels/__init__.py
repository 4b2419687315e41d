"""The quantiser of NF4 and FP4 for CPUs, and its kernel, compiled by numba."""
