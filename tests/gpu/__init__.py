"""What runs on a real GPU: the kernels' cases, NVIDIA's checker, and a table of times."""
