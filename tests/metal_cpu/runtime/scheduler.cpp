// Runs a kernel's threads: one threadgroup after another, its simdgroups interleaved, the lanes of
// a simdgroup in any order between the points where Metal makes them meet. A seed picks the order.
// Over 400 lines: fibers, signals and memory share state that nothing outside this file may see.
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>

#include "fiber.h"
#include "runtime.h"

Region regions[kMaxRegions];
int region_count;
Clock now;
uint32_t current_group;
ThreadAttributes* mcpu_thread;

namespace {

typedef void (*Entry)(void** buffers, ThreadAttributes* thread);

Entry entry;
void** buffers;
LaunchOptions options;
Fault faults[kMaxFaults];
int fault_count;
jmp_buf launch_end;
uint64_t random_state;  // 0: everything runs in order
SimdExchange exchanges[32];

struct Mapping {
  void* base;
  size_t size;
};
struct ThreadgroupVariable {
  const void* key;  // one per declaration
  int region;
  uint32_t group;  // the threadgroup it was last reset for
  Mapping mapping;
};
ThreadgroupVariable variables[64];
int variable_count;
size_t threadgroup_bytes;

[[noreturn]] void fatal(int kind, int site, long a = 0, long b = 0) {
  mcpu_fault(kind, site, a, b);
  abort_launch();
}

uint32_t random_below(uint32_t n) {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (uint32_t)(random_state >> 11) % n;
}

void shuffled(uint32_t* order, uint32_t n) {
  for (uint32_t i = 0; i < n; i++) order[i] = i;
  if (!random_state) return;
  for (uint32_t i = n; i > 1; i--) {
    const uint32_t j = random_below(i), swap = order[i - 1];
    order[i - 1] = order[j];
    order[j] = swap;
  }
}

void wait_at(FiberState state, int site) {
  current->state = state;
  current->site = site;
  switch_to_scheduler();
}

void advance_clock(int flags, uint32_t& device, uint32_t& threadgroup) {
  if (flags & kDeviceMemory) device++;
  if (flags & kThreadgroupMemory) threadgroup++;
}

// ---- simdgroups ---------------------------------------------------------------------------------

// Runs a simdgroup to its next meeting point and, unless that is a threadgroup barrier, past it.
bool advance_simdgroup(uint32_t index, uint32_t threads) {
  Fiber* lanes = fibers + index * 32;
  const uint32_t width = threads - index * 32 < 32 ? threads - index * 32 : 32;
  uint32_t order[32];
  shuffled(order, width);
  for (uint32_t i = 0; i < width; i++)
    if (lanes[order[i]].state == kReady) switch_to(lanes[order[i]]);

  uint32_t waiting[kDone + 1] = {};  // lanes by state
  for (uint32_t i = 0; i < width; i++) waiting[lanes[i].state] |= 1u << i;
  const bool simd = waiting[kAtSimd];
  const uint32_t here = simd ? waiting[kAtSimd] : waiting[kAtSimdBarrier];
  if (!here) return false;

  const uint32_t alive = (width == 32 ? ~0u : (1u << width) - 1) & ~waiting[kDone];
  Fiber& first = lanes[__builtin_ctz(here)];
  uint32_t together = 0;
  for (uint32_t i = 0; i < width; i++)
    if ((here >> i & 1) && lanes[i].site == first.site) together |= 1u << i;
  if (together != alive && !(simd && options.divergent_simd)) {
    mcpu_thread = &first.attributes;
    fatal(simd ? kDivergentSimd : kDivergentSimdBarrier, first.site, together, alive);
  }
  if (simd) {
    SimdExchange& exchange = exchanges[index];
    exchange.mask = together;
    exchange.has_result = false;
    for (uint32_t i = 0; i < width; i++) memcpy(exchange.value[i], lanes[i].value, 32);
  } else {
    advance_clock(first.flags, now.simdgroup[0][index], now.simdgroup[1][index]);
  }
  for (uint32_t i = 0; i < width; i++)
    if (together >> i & 1) lanes[i].state = kReady;
  return true;
}

// ---- threadgroups -------------------------------------------------------------------------------

void run_threadgroup(uint32_t threads) {
  const uint32_t simdgroups = (threads + 31) / 32;
  for (;;) {
    uint32_t active[32], count = simdgroups;
    shuffled(active, count);
    while (count) {
      const uint32_t k = random_state ? random_below(count) : 0;
      if (advance_simdgroup(active[k], threads)) continue;
      memmove(active + k, active + k + 1, (--count - k) * sizeof(active[0]));
    }
    const Fiber* first = nullptr;
    uint32_t waiting = 0;
    for (uint32_t i = 0; i < threads; i++) {
      if (fibers[i].state != kAtBarrier) continue;
      waiting++;
      if (!first) first = &fibers[i];
      mcpu_thread = &fibers[i].attributes;
      if (fibers[i].site != first->site) fatal(kDifferentBarriers, fibers[i].site, first->site);
    }
    if (!waiting) return;
    if (waiting != threads) fatal(kExitedBeforeBarrier, first->site, waiting, threads - waiting);
    advance_clock(first->flags, now.group[0], now.group[1]);
    for (uint32_t i = 0; i < threads; i++) fibers[i].state = kReady;
  }
}

// As Metal's dispatchThreads: groups at the grid's edge are smaller when it does not divide evenly.
uint32_t place_threads(uint32_t group) {
  uint32_t full[3], groups[3], at[3], size[3];
  for (int i = 0; i < 3; i++) {
    full[i] = options.threadgroup[i] < options.grid[i] ? options.threadgroup[i] : options.grid[i];
    groups[i] = (options.grid[i] + full[i] - 1) / full[i];
  }
  at[0] = group % groups[0];
  at[1] = group / groups[0] % groups[1];
  at[2] = group / groups[0] / groups[1];
  for (int i = 0; i < 3; i++) {
    size[i] = options.grid[i] - at[i] * full[i];
    if (size[i] > full[i]) size[i] = full[i];
  }
  const uint32_t threads = size[0] * size[1] * size[2];
  for (uint32_t t = 0; t < threads; t++) {
    ThreadAttributes& a = fibers[t].attributes;
    const uint32_t in_group[3] = {t % size[0], t / size[0] % size[1], t / size[0] / size[1]};
    for (int i = 0; i < 3; i++) {
      a.position_in_threadgroup[i] = in_group[i];
      a.threadgroup_in_grid[i] = at[i];
      a.position_in_grid[i] = at[i] * full[i] + in_group[i];
      a.threadgroups_per_grid[i] = groups[i];
      a.threads_per_grid[i] = options.grid[i];
      a.threads_per_threadgroup[i] = size[i];
      a.dispatch_threads_per_threadgroup[i] = full[i];
    }
    a.index_in_threadgroup = t;
    a.lane = t % 32;
    a.simdgroup = t / 32;
    a.simdgroups = (threads + 31) / 32;
    fibers[t].state = kReady;
    prepare(fibers[t]);
  }
  return threads;
}

void run_grid() {
  uint32_t groups = 1;
  for (int i = 0; i < 3; i++) {
    const uint32_t size =
        options.threadgroup[i] < options.grid[i] ? options.threadgroup[i] : options.grid[i];
    groups *= (options.grid[i] + size - 1) / size;
  }
  static uint32_t* order;
  order = (uint32_t*)realloc(order, groups * sizeof(uint32_t));
  shuffled(order, groups);
  for (uint32_t i = 0; i < groups; i++) {
    current_group = order[i];
    now.group[0]++;
    now.group[1]++;
    run_threadgroup(place_threads(current_group));
  }
  checker_find_unwritten();
}

// ---- signals ------------------------------------------------------------------------------------

const int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE, SIGVTALRM};
constexpr int kSignalCount = sizeof(kSignals) / sizeof(int);
struct sigaction old_actions[kSignalCount];
stack_t old_stack;
pthread_t launching_thread;

int nearest_region(const char* address, long& offset) {
  int nearest = -1;
  long best = 5l << 30;  // just beyond a buffer's guard zone
  for (int i = 0; i < region_count; i++) {
    const long from_start = address - regions[i].start;
    const long from_end = from_start - (long)regions[i].size;
    const long distance = from_start < 0 ? -from_start : from_end < 0 ? 0 : from_end;
    if (distance < best) best = distance, nearest = i, offset = from_start;
  }
  return nearest;
}

void on_signal(int signal, siginfo_t* info, void* context) {
  if (!pthread_equal(pthread_self(), launching_thread)) {
    if (signal == SIGVTALRM)
      pthread_kill(launching_thread, signal);  // it may pick any thread
    else
      ::signal(signal, SIG_DFL);  // not a kernel's fault
    return;
  }
  Fault fault{};
  fault.region = fault.other_thread = -1;
#if defined(__x86_64__)
  fault.pc = ((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP] + 1;  // + 1: as a return address
#elif defined(__aarch64__)
  fault.pc = ((ucontext_t*)context)->uc_mcontext.pc + 1;
#endif
  fault.kind = signal == SIGVTALRM ? kTimeout : kTrap;
  if (signal == SIGSEGV || signal == SIGBUS) {
    const char* address = (const char*)info->si_addr;
    fault.kind = on_any_stack(address) ? kStackOverflow : kGuardPage;
    fault.region = nearest_region(address, fault.a);
    const bool inside =
        fault.region >= 0 && fault.a >= 0 && fault.a < (long)regions[fault.region].size;
    if (inside) fault.kind = kWriteToConst;
  }
  add_fault(fault);
  siglongjmp(launch_end, 1);
}

void install_signals() {
  static char stack[1 << 16];
  stack_t alternative{};
  alternative.ss_sp = stack;
  alternative.ss_size = sizeof(stack);
  sigaltstack(&alternative, &old_stack);
  struct sigaction action{};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < kSignalCount; i++) sigaction(kSignals[i], &action, &old_actions[i]);
  launching_thread = pthread_self();
}

void restore_signals() {
  for (int i = 0; i < kSignalCount; i++) sigaction(kSignals[i], &old_actions[i], nullptr);
  sigaltstack(&old_stack, nullptr);
}

void set_timer(double seconds) {  // of this process's CPU time, so a busy machine does not matter
  struct itimerval timer{};
  timer.it_value.tv_sec = (long)seconds;
  timer.it_value.tv_usec = (long)((seconds - (long)seconds) * 1e6);
  setitimer(ITIMER_VIRTUAL, &timer, nullptr);
}

// ---- memory -------------------------------------------------------------------------------------

constexpr size_t kPage = 4096;

// Poisoned memory between two inaccessible zones of `guard` bytes each.
char* map_guarded(size_t size, size_t guard, Mapping& mapping) {
  const size_t body = (size + kPage) / kPage * kPage;
  mapping.size = body + 2 * guard;
  mapping.base =
      mmap(nullptr, mapping.size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping.base == MAP_FAILED) return nullptr;
  char* start = (char*)mapping.base + guard;
  mprotect(start, body, PROT_READ | PROT_WRITE);
  memset(start, 0xff, body);
  return start;
}

}  // namespace

void abort_launch() { longjmp(launch_end, 1); }

bool running() { return current != nullptr; }

void add_fault(Fault fault) {
  for (int i = 0; i < fault_count; i++)  // one report per place in the source is enough
    if (faults[i].kind == fault.kind && faults[i].pc == fault.pc && faults[i].site == fault.site &&
        faults[i].region == fault.region)
      return;
  if (fault_count == kMaxFaults) return;
  if (mcpu_thread) {
    memcpy(fault.threadgroup, mcpu_thread->threadgroup_in_grid, sizeof(fault.threadgroup));
    fault.thread = mcpu_thread->index_in_threadgroup;
  }
  if (fault.region >= 0) fault.variable_name = regions[fault.region].name;
  faults[fault_count++] = fault;
  // Going on after these would let the kernel damage memory that is not its own.
  if (running() && (fault.kind == kOutOfBounds || fault.kind == kWriteToConst)) abort_launch();
}

bool on_any_stack(const char* address) {
  return address >= stacks && address < stacks + kStackSize * kMaxThreads;
}
bool on_own_stack(const char* address) {
  const char* stack = stack_of(*current);
  return address >= stack && address < stack + kStackSize;
}

void __attribute__((used)) fiber_main() {
  entry(buffers, &current->attributes);
  wait_at(kDone, 0);
  __builtin_trap();
}

extern "C" {

SimdExchange* mcpu_simd(const void* value, int size, int site) {
  memcpy(current->value, value, size);
  wait_at(kAtSimd, site);
  return &exchanges[current->attributes.simdgroup];
}

void mcpu_barrier(int scope, int flags, int site) {
  current->flags = flags;
  wait_at(scope == kThreadgroup ? kAtBarrier : kAtSimdBarrier, site);
}

void mcpu_fault(int kind, int site, long a, long b) {
  Fault fault{};
  fault.kind = kind;
  fault.site = site;
  fault.region = fault.other_thread = -1;
  fault.a = a;
  fault.b = b;
  if (kind == kVectorIndex) fault.pc = (uintptr_t)__builtin_return_address(0);
  add_fault(fault);
  if (kind == kVectorIndex) abort_launch();
}

void* mcpu_threadgroup(const void* key, const char* name, size_t size, int granularity, int site) {
  ThreadgroupVariable* variable = variables;
  while (variable < variables + variable_count && variable->key != key) variable++;
  if (variable == variables + variable_count) {
    threadgroup_bytes += (size + 15) / 16 * 16;
    if (threadgroup_bytes > kThreadgroupLimit || variable_count == 64)
      fatal(kThreadgroupTooLarge, site, threadgroup_bytes, kThreadgroupLimit);
    const size_t rounded = (size + 15) / 16 * 16;
    char* memory = map_guarded(rounded, 1 << 16, variable->mapping);
    memory += (rounded + kPage) / kPage * kPage - rounded;  // its end touches the guard zone
    *variable = {key, region_count, ~0u, variable->mapping};
    regions[region_count++] = {memory, size, kThreadgroupVariable, granularity, 0, name, {}};
    checker_add_region(variable->region);
    variable_count++;
  }
  if (variable->group != current_group) {  // Metal does not clear it between threadgroups either
    variable->group = current_group;
    memset(regions[variable->region].start, 0xff, size);
    checker_reset_region(variable->region);
  }
  return regions[variable->region].start;
}

void* mcpu_map(size_t size, size_t guard, Mapping* mapping) {
  return map_guarded(size, guard, *mapping);
}
void mcpu_make_readonly(const Mapping* mapping, size_t guard) {
  mprotect((char*)mapping->base + guard, mapping->size - 2 * guard, PROT_READ);
}
void mcpu_unmap(const Mapping* mapping) { munmap(mapping->base, mapping->size); }

// `buffer_regions` is updated with each buffer's traffic. Returns the number of faults, or -1 if
// the launch must be repeated with byte_cells.
int mcpu_launch(Entry kernel, void** kernel_buffers, Region* buffer_regions, int buffer_count,
                const LaunchOptions* launch_options, Fault* reported,
                size_t* used_threadgroup_bytes) {
  allocate_stacks();
  entry = kernel;
  buffers = kernel_buffers;
  options = *launch_options;
  random_state = options.seed ? options.seed * 0x9E3779B97F4A7C15ull | 1 : 0;
  fault_count = variable_count = 0;
  threadgroup_bytes = 0;
  mcpu_thread = nullptr;
  current = nullptr;
  memset(&now, 0, sizeof(now));
  region_count = buffer_count;
  memcpy(regions, buffer_regions, buffer_count * sizeof(Region));
  checker_begin(options.checked, options.byte_cells);
  for (int i = 0; i < buffer_count; i++) checker_add_region(i);

  install_signals();
  set_timer(options.timeout_s);
  if (!sigsetjmp(launch_end, 0)) run_grid();
  set_timer(0);
  restore_signals();

  current = nullptr;
  checker_end();
  for (int i = 0; i < variable_count; i++) mcpu_unmap(&variables[i].mapping);
  memcpy(buffer_regions, regions, buffer_count * sizeof(Region));
  memcpy(reported, faults, fault_count * sizeof(Fault));
  *used_threadgroup_bytes = threadgroup_bytes;
  return checker_needs_byte_cells() ? -1 : fault_count;
}

}  // extern "C"

#ifdef __clang__
// bfloat16 rounding (to nearest, ties to even), which zig's shared-library link does not provide.
extern "C" __attribute__((weak)) __bf16 __truncsfbf2(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  const uint16_t rounded = nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  __bf16 result;
  memcpy(&result, &rounded, 2);
  return result;
}
extern "C" __attribute__((weak)) __bf16 __truncdfbf2(double x) { return __truncsfbf2((float)x); }
#endif
