// In the place of MLX's header of this name: what a kernel's signature needs of it.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#ifndef __CUDACC_RTC__
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
