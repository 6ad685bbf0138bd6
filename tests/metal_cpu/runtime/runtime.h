// Shared by the scheduler (scheduler.cpp) and the access checker (checker.cpp).
#pragma once
#include <stdint.h>
#include <string.h>

#include "abi.h"

enum RegionKind { kInput, kOutput, kThreadgroupVariable };

struct Traffic {
  uint64_t loaded, loaded_distinct, loaded_per_threadgroup, stored, stored_distinct;
};

// A buffer or a threadgroup variable. Mirrored by _Region in launch.py.
struct Region {
  char* start;
  size_t size;
  int kind;
  int granularity;   // bytes per shadow cell: the smallest unit that is accessed by itself
  int initialised;   // false: memory holds poison, and reading it before writing is a fault
  const char* name;  // a threadgroup variable's
  Traffic traffic;
};

// One diagnosis. Mirrored by _Fault in launch.py.
struct Fault {
  int kind, site, region, is_write;
  long a, b;
  uint32_t threadgroup[3], thread;
  uintptr_t pc, other_pc;
  int other_thread, other_is_elsewhere;  // -1: unknown; is it in another threadgroup?
  const char* variable_name;             // of the threadgroup variable, if it is one
};

struct LaunchOptions {  // mirrored by _Options in launch.py
  uint32_t grid[3], threadgroup[3];
  uint64_t seed;
  int checked, divergent_simd, byte_cells;
  double timeout_s;
};

constexpr int kMaxRegions = 160, kMaxFaults = 32, kMaxThreads = 1024;
constexpr size_t kStackSize = 128 << 10, kThreadgroupLimit = 32 << 10;

// Where the running thread is in the synchronisation order. A threadgroup barrier advances the
// group's epoch, a simdgroup barrier the simdgroup's, each for the memory that its flags name.
struct Clock {
  uint32_t group[2], simdgroup[2][32];  // [0]: device memory, [1]: threadgroup memory
};

extern Region regions[kMaxRegions];
extern int region_count;
extern Clock now;
extern uint32_t current_group;  // index of the running threadgroup in the grid

bool running();  // is a kernel thread running?
void add_fault(Fault fault);
[[noreturn]] void abort_launch();
bool on_own_stack(const char* address);
bool on_any_stack(const char* address);

void checker_begin(bool enabled, bool byte_cells);
bool checker_needs_byte_cells();  // a cell was accessed in parts
void checker_add_region(int index);
void checker_reset_region(int index);  // a threadgroup variable, when a new threadgroup starts
void checker_find_unwritten();
void checker_end();
