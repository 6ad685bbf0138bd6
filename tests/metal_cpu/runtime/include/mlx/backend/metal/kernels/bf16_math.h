#pragma once  // stands in for MLX's: msl/math.h overloads the functions on bfloat by itself
