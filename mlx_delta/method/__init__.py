"""What is computed, in plain NumPy: the specification that everything faster must agree with."""
