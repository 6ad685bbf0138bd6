// What a compiled kernel and the runtime agree on. Plain C types only, so that it needs no library.
#pragma once
#include <stddef.h>
#include <stdint.h>

// One per GPU thread. The names are those of Metal's attributes, shortened.
struct ThreadAttributes {
  uint32_t position_in_grid[3], position_in_threadgroup[3], threadgroup_in_grid[3];
  uint32_t threadgroups_per_grid[3], threads_per_grid[3];
  uint32_t threads_per_threadgroup[3];           // smaller in the groups at the grid's edge
  uint32_t dispatch_threads_per_threadgroup[3];  // as dispatched
  uint32_t index_in_threadgroup, lane, simdgroup, simdgroups;
};

// The lanes of a simdgroup meet here: each leaves a value, then each reads all of them.
struct SimdExchange {
  uint32_t mask;    // the lanes that take part
  bool has_result;  // `result` was computed by the first lane to resume
  alignas(32) unsigned char value[32][32];
  alignas(32) unsigned char result[512];
};

enum BarrierScope { kSimdgroup = 0, kThreadgroup = 1 };
enum BarrierFlags { kDeviceMemory = 1, kThreadgroupMemory = 2 };

// Must match FAULTS in errors.py.
enum FaultKind {
  kRace,
  kUninitialised,
  kOutOfBounds,
  kWriteToConst,
  kUnwrittenOutput,
  kGuardPage,
  kStackOverflow,
  kTrap,
  kTimeout,
  kDivergentSimd,
  kDivergentSimdBarrier,
  kExitedBeforeBarrier,
  kDifferentBarriers,
  kInactiveLane,
  kVectorIndex,
  kThreadgroupTooLarge,
  kMatrixLanes,
};

extern "C" {
extern ThreadAttributes* mcpu_thread;  // the running thread's
SimdExchange* mcpu_simd(const void* value, int size, int site);
void mcpu_barrier(int scope, int flags, int site);
void mcpu_fault(int kind, int site, long a, long b);
void mcpu_atomic(const volatile void* address, int size, int loads, int stores, void* caller);
void* mcpu_threadgroup(const void* key, const char* name, size_t size, int granularity, int site);
}
