"""The machine: BLAS, chips, and what the command lines share."""
