"""The kernels as CUDA: compiled with nvcc, and the instructions that come of it counted."""
