"""Single tokens at the speed of memory: a model's layers written as one list of operations for `kernels.cpu.tape`."""
