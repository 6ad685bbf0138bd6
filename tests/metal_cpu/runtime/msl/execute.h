// The Metal standard library for the executing pass: address spaces vanish, as all memory is flat.
#pragma once
#define __METAL__ 1
#define __METAL_VERSION__ 310
#define METAL_FUNC inline
#include "atomic.h"
#include "matrix.h"

using namespace metal;
#define device
#define thread
#define threadgroup  // declarations of threadgroup variables were rewritten: see rewrite.py
#define kernel
#ifdef __clang__
#define constant const
#else
#define constant  // g++ refuses the repeated const in `const constant int&`
#endif
#define double metal_has_no_double_type
