"""The method on arrays: MLX operations, and the choice between them and kernels."""
