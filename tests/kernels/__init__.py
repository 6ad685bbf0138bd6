"""The Metal kernels, run on the bench (tests/metal_cpu) or, on a Mac, on its GPU."""
