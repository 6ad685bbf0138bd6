// The access checker. Kernels are compiled with -fsanitize=thread, which makes the compiler call
// __tsan_read4(address) and the like before every access; these are our own definitions of them.
//
// A race is decided exactly, not by luck of the schedule: two accesses to the same cell conflict
// unless a barrier separates them, whichever order they happened to run in.
#include <stdlib.h>

#include "runtime.h"

namespace {

enum Breadth : uint8_t { kNobody, kOneThread, kLanes, kSimdgroups, kGroups };

// Who accessed a cell since it was last written. As everything runs in some order, it is enough to
// know the latest accessor and how widely the others are spread.
struct Accessors {
  Breadth breadth;
  uint16_t thread;
  uint32_t group, epoch, simd_epoch;
  uintptr_t pc;
};

struct Cell {
  Accessors writer, readers, atomics;
  bool initialised;
};

struct Shadow {
  Cell* cells;                // null for inputs, which cannot race
  uint32_t *loaded, *stored;  // per byte: 1 + the last threadgroup that touched it
};

Shadow shadows[kMaxRegions];
bool enabled, byte_cells, needs_byte_cells;
int last_region;

int find_region(const char* p) {
  const Region& last = regions[last_region];
  if (last_region < region_count && p >= last.start && p < last.start + last.size)
    return last_region;
  for (int i = 0; i < region_count; i++)
    if (p >= regions[i].start && p < regions[i].start + regions[i].size) return last_region = i;
  return -1;
}

// The region whose pages `p` lies in, next to the region itself. Farther off, the guard pages are
// hit.
int find_near(const char* p) {
  for (int i = 0; i < region_count; i++)
    if (p >= regions[i].start - 8192 && p < regions[i].start + regions[i].size + 8192) return i;
  return -1;
}

struct Me {
  int memory;  // 0: device, 1: threadgroup
  uint16_t thread;
  uint32_t simdgroup, epoch, simd_epoch;
  uintptr_t pc;
};

// Could `who` run at the same time as me?
bool concurrent(const Accessors& who, const Me& me) {
  if (who.breadth == kNobody) return false;
  if (who.breadth == kGroups) return true;
  if (who.group != current_group) return true;
  if (who.epoch != me.epoch) return false;
  if (who.breadth == kSimdgroups || who.thread / 32u != me.simdgroup) return true;
  if (who.simd_epoch != me.simd_epoch) return false;
  return who.breadth == kLanes || who.thread != me.thread;
}

void add(Accessors& who, const Me& me) {
  Breadth breadth = kOneThread;
  if (who.breadth == kGroups || (who.breadth != kNobody && who.group != current_group))
    breadth = kGroups;
  else if (who.breadth != kNobody && who.epoch == me.epoch) {
    if (who.breadth == kSimdgroups || who.thread / 32u != me.simdgroup)
      breadth = kSimdgroups;
    else if (who.simd_epoch == me.simd_epoch && (who.breadth == kLanes || who.thread != me.thread))
      breadth = kLanes;
  }
  who = {breadth, me.thread, current_group, me.epoch, me.simd_epoch, me.pc};
}

void report(int kind, int region, long offset, int size, bool is_write, uintptr_t pc,
            const Accessors* other = nullptr) {
  Fault fault{};
  fault.kind = kind;
  fault.region = region;
  fault.a = offset;
  fault.b = size;
  fault.is_write = is_write;
  fault.pc = pc;
  fault.other_thread = other ? other->thread : -1;
  fault.other_is_elsewhere = other && other->group != current_group;
  fault.other_pc = other ? other->pc : 0;
  add_fault(fault);
}

void count(uint32_t* seen, long offset, int size, uint64_t& total, uint64_t& distinct,
           uint64_t* per_threadgroup) {
  total += size;
  for (long i = offset; i < offset + size; i++) {
    distinct += seen[i] == 0;
    if (per_threadgroup) *per_threadgroup += seen[i] != current_group + 1;
    seen[i] = current_group + 1;
  }
}

struct AccessType {
  bool loads, stores, atomic;
};

void access(const void* address, long size, AccessType type, const void* return_address) {
  if (!enabled || !running() || !size) return;
  const char* p = (const char*)address;
  if (on_own_stack(p)) return;
  const uintptr_t pc = (uintptr_t)return_address;
  const int index = find_region(p);
  if (index < 0) {
    const int near = find_near(p);
    if (near >= 0) report(kOutOfBounds, near, p - regions[near].start, size, type.stores, pc);
    if (on_any_stack(p)) report(kOutOfBounds, -1, 0, size, type.stores, pc);  // another thread's
    return;  // a constant in the kernel's own image
  }
  Region& region = regions[index];
  const long offset = p - region.start;
  if (offset + size > (long)region.size)
    return report(kOutOfBounds, index, offset, size, type.stores, pc);
  if (type.stores && region.kind == kInput)
    return report(kWriteToConst, index, offset, size, true, pc);

  Shadow& shadow = shadows[index];
  if (region.kind != kThreadgroupVariable) {
    Traffic& t = region.traffic;
    if (type.loads)
      count(shadow.loaded, offset, size, t.loaded, t.loaded_distinct, &t.loaded_per_threadgroup);
    if (type.stores) count(shadow.stored, offset, size, t.stored, t.stored_distinct, nullptr);
  }
  if (!shadow.cells) return;
  if (offset % region.granularity || size % region.granularity) {
    needs_byte_cells = true;  // say, bytes of an array of float
    abort_launch();
  }

  const int memory = region.kind == kThreadgroupVariable;
  const uint32_t simdgroup = mcpu_thread->simdgroup;
  const Me me = {memory,
                 (uint16_t)mcpu_thread->index_in_threadgroup,
                 simdgroup,
                 now.group[memory],
                 now.simdgroup[memory][simdgroup],
                 pc};
  const Accessors* race = nullptr;
  bool uninitialised = false;
  const long last = (offset + size - 1) / region.granularity;
  for (long i = offset / region.granularity; i <= last; i++) {
    Cell& cell = shadow.cells[i];
    if (type.loads && !cell.initialised) uninitialised = true;
    if (concurrent(cell.writer, me)) race = &cell.writer;
    if ((type.stores || type.atomic) && concurrent(cell.readers, me)) race = &cell.readers;
    if (!type.atomic && concurrent(cell.atomics, me)) race = &cell.atomics;
    if (race) {  // once per place: forget the others, or every later access would repeat it
      report(kRace, index, offset, size, type.stores, pc, race);
      cell.writer.breadth = cell.readers.breadth = cell.atomics.breadth = kNobody;
      race = nullptr;
    }
    if (type.atomic)
      add(cell.atomics, me);
    else if (type.stores) {
      cell.writer = {kOneThread, me.thread, current_group, me.epoch, me.simd_epoch, pc};
      cell.readers.breadth = cell.atomics.breadth = kNobody;  // ordered before this write
    } else
      add(cell.readers, me);
    if (type.stores) cell.initialised = true;
  }
  if (uninitialised) report(kUninitialised, index, offset, size, false, pc);
}

size_t cell_count(const Region& region) { return region.size / region.granularity + 1; }

}  // namespace

void checker_begin(bool on, bool cells_of_one_byte) {
  enabled = on;
  byte_cells = cells_of_one_byte;
  needs_byte_cells = false;
  last_region = 0;
}

bool checker_needs_byte_cells() { return needs_byte_cells; }

void checker_add_region(int index) {
  Region& region = regions[index];
  Shadow& shadow = shadows[index] = {};
  if (!enabled) return;
  if (byte_cells) region.granularity = 1;
  if (region.kind != kThreadgroupVariable) {
    shadow.loaded = (uint32_t*)calloc(region.size + 1, sizeof(uint32_t));
    shadow.stored = (uint32_t*)calloc(region.size + 1, sizeof(uint32_t));
  }
  if (region.kind != kInput) {
    shadow.cells = (Cell*)malloc(cell_count(region) * sizeof(Cell));
    checker_reset_region(index);
  }
}

void checker_reset_region(int index) {
  Cell* cells = shadows[index].cells;
  if (!cells) return;
  memset(cells, 0, cell_count(regions[index]) * sizeof(Cell));
  if (regions[index].initialised)
    for (size_t i = 0; i < cell_count(regions[index]); i++) cells[i].initialised = true;
}

void checker_find_unwritten() {
  if (!enabled) return;
  for (int i = 0; i < region_count; i++) {
    const Region& region = regions[i];
    if (region.kind != kOutput) continue;
    const size_t cells = region.size / region.granularity;
    size_t first = cells, missing = 0;
    for (size_t c = cells; c-- > 0;)
      if (!shadows[i].cells[c].initialised) missing++, first = c;
    if (missing)
      report(kUnwrittenOutput, i, first * region.granularity, missing * region.granularity, true,
             0);
  }
}

void checker_end() {
  enabled = false;
  for (int i = 0; i < region_count; i++) {
    free(shadows[i].cells);
    free(shadows[i].loaded);
    free(shadows[i].stored);
    shadows[i] = {};
  }
}

extern "C" {

#define CALLER __builtin_return_address(0)

void mcpu_atomic(const volatile void* address, int size, int loads, int stores, void* caller) {
  access((const void*)address, size, {loads != 0, stores != 0, true}, caller);
}

#define TSAN_CALLBACKS(prefix, size) \
  void prefix##read##size(void* p) { access(p, size, {true, false, false}, CALLER); } \
  void prefix##write##size(void* p) { access(p, size, {false, true, false}, CALLER); } \
  void prefix##read_write##size(void* p) { \
    access(p, size, {true, false, false}, CALLER); \
    access(p, size, {false, true, false}, CALLER); \
  }
#define TSAN_SIZES(prefix) \
  TSAN_CALLBACKS(prefix, 1) \
  TSAN_CALLBACKS(prefix, 2) \
  TSAN_CALLBACKS(prefix, 4) TSAN_CALLBACKS(prefix, 8) TSAN_CALLBACKS(prefix, 16)
TSAN_SIZES(__tsan_)
TSAN_SIZES(__tsan_unaligned_)

void __tsan_read_range(void* p, long size) { access(p, size, {true, false, false}, CALLER); }
void __tsan_write_range(void* p, long size) { access(p, size, {false, true, false}, CALLER); }
void* __tsan_memcpy(void* to, const void* from, size_t size) {
  access(from, size, {true, false, false}, CALLER);
  access(to, size, {false, true, false}, CALLER);
  return memcpy(to, from, size);
}
void* __tsan_memmove(void* to, const void* from, size_t size) {
  access(from, size, {true, false, false}, CALLER);
  access(to, size, {false, true, false}, CALLER);
  return memmove(to, from, size);
}
void* __tsan_memset(void* to, int value, size_t size) {
  access(to, size, {false, true, false}, CALLER);
  return memset(to, value, size);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

}  // extern "C"
