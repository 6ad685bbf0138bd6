// Fibers: one per GPU thread, all on one operating-system thread, so that a schedule is repeatable.
#pragma once
#include <stdint.h>
#include <sys/mman.h>

#include "runtime.h"
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

enum FiberState { kReady, kAtSimd, kAtSimdBarrier, kAtBarrier, kDone };

struct Fiber {
  ThreadAttributes attributes;
  FiberState state;
  int site, flags;
  alignas(32) unsigned char value[32];  // what it brings to a simd function
#if defined(__x86_64__)
  void* stack_pointer;
#else
  ucontext_t context;
#endif
};

inline Fiber fibers[kMaxThreads];
inline Fiber* current;  // null while the scheduler runs
inline char* stacks;

inline char* stack_of(const Fiber& fiber) { return stacks + (&fiber - fibers) * kStackSize; }

inline void allocate_stacks() {
  if (stacks) return;
  stacks = (char*)mmap(nullptr, kStackSize * kMaxThreads, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  for (int i = 0; i < kMaxThreads; i++) mprotect(stacks + i * kStackSize, 4096, PROT_NONE);
}

void fiber_main();  // never returns

#if defined(__x86_64__)
// swapcontext() makes a system call per switch; this is forty times faster. It saves the registers
// that the System V calling convention asks a function to preserve, and swaps the stacks.
extern "C" void mcpu_switch(void** save, void* to);
__asm__(
    ".text\n.globl mcpu_switch\n.hidden mcpu_switch\nmcpu_switch:\n"
    " push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    " mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
    " pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");

inline void* scheduler_stack_pointer;

inline void prepare(Fiber& fiber) {
  void** stack = (void**)(stack_of(fiber) + kStackSize);
  *--stack = nullptr;  // keeps the stack aligned as after a call
  *--stack = (void*)fiber_main;
  for (int i = 0; i < 6; i++) *--stack = nullptr;
  fiber.stack_pointer = stack;
}
inline void switch_to(Fiber& fiber) {
  current = &fiber;
  mcpu_thread = &fiber.attributes;
  mcpu_switch(&scheduler_stack_pointer, fiber.stack_pointer);
  current = nullptr;
}
inline void switch_to_scheduler() { mcpu_switch(&current->stack_pointer, scheduler_stack_pointer); }
#else
inline ucontext_t scheduler_context;

inline void prepare(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack_of(fiber);
  fiber.context.uc_stack.ss_size = kStackSize;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}
inline void switch_to(Fiber& fiber) {
  current = &fiber;
  mcpu_thread = &fiber.attributes;
  swapcontext(&scheduler_context, &fiber.context);
  current = nullptr;
}
inline void switch_to_scheduler() { swapcontext(&current->context, &scheduler_context); }
#endif
