"""The specification, in plain NumPy steps."""
