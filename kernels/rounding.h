// For kernels that decide by comparing: what they compute must not hang on how a compiler adds up.

#ifndef EXACT_PRODUCT
#define EXACT_PRODUCT
#pragma METAL fp contract(off)
// A product that is rounded before anything is added to it.
inline float exact_product(float a, float b) { return a * b; }
#endif
