// In the place of MLX's header of this name: what a kernel's signature needs of it.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#ifdef __CUDACC_RTC__
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long long int64_t;
#else
#include <stdint.h>
#endif

namespace mlx::core::cu {
template <typename T>
struct Numbers {
  T numbers[10];
  __host__ __device__ const T& operator[](int i) const { return numbers[i]; }
};
using Shape = Numbers<int32_t>;
using Strides = Numbers<int64_t>;
}  // namespace mlx::core::cu
