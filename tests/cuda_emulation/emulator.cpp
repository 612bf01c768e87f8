// Runs CUDA device code on the CPU, one block at a time: threads are fibers that a seed shuffles, warps have 32 lanes.
// Shuffles and barriers are collective; lanes or threads that part ways before one are an error. Compiled without the
// sanitizers that watch the device code: what is here runs between any two of its collectives.
#include "emulator.h"

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using emulation::kLanes, emulation::kMaxThreads;

constexpr size_t kStackBytes = size_t(128) << 10, kGuardBytes = size_t(4) << 10;
constexpr char kBarrier[] = "__syncthreads";

// Control goes from one stack to another. swapcontext would do, but it saves the mask of signals by two system calls,
// and a kernel switches tens of thousands of times.
#if defined(__x86_64__)
struct Context {
  void* stack_pointer;
};
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, . - emulation_switch
)");

void switch_to(Context& from, Context& to) { emulation_switch(&from.stack_pointer, to.stack_pointer); }

void begin_at(Context& context, char* stack, void (*entry)()) {
  // A function finds its stack 8 bytes off a multiple of 16; below lie its address and the six registers.
  auto* words = reinterpret_cast<void**>(stack + kStackBytes) - 2;
  *words = reinterpret_cast<void*>(entry);
  std::fill_n(words - 6, 6, nullptr);
  context.stack_pointer = words - 6;
}
#else
using Context = ucontext_t;

void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }

void begin_at(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack = {stack, 0, kStackBytes};
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

// Memory whose first page may not be touched, so that a stack that is too small is no silent matter.
char* new_stack() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("emulation: no memory for the stack of a thread");
  mprotect(memory, kGuardBytes, PROT_NONE);
  return static_cast<char*>(memory) + kGuardBytes;
}

struct Fiber {
  Context context;
  char* stack = new_stack();
  const char* waits_at;  // the collective that it has reached
  bool done;
  uint32_t value;   // what it gives to a shuffle, then what it gets
  unsigned source;  // the lane that it wants to hear
};

struct Warp {
  unsigned char runnable[kLanes];
  unsigned count;
};

// The current launch. Stacks are kept from launch to launch.
std::vector<Fiber> fibers;
Context scheduler;
unsigned running;
void (*kernel)(const void*);
const void* arguments;
const char* failure;

void fiber_main() {
  kernel(arguments);
  fibers[running].done = true;
  switch_to(fibers[running].context, scheduler);
}

void wait_at(const char* collective) {
  Fiber& self = fibers[running];
  self.waits_at = collective;
  switch_to(self.context, scheduler);
}

// Abandons the launch in the middle of it.
[[noreturn]] void fail(const char* what, unsigned threads) {
  std::string text = std::string("emulation: ") + what + " in block " + std::to_string(blockIdx.x);
  for (unsigned i = 0; i < threads; ++i) {
    const Fiber& fiber = fibers[i];
    if (i == 0 || fiber.waits_at != fibers[i - 1].waits_at || fiber.done != fibers[i - 1].done)
      text += "\n  thread " + std::to_string(i) +
              (fiber.done       ? " has returned"
               : fiber.waits_at ? std::string(" waits at ") + fiber.waits_at
                                : " runs");
    __asan_unpoison_memory_region(fiber.stack, kStackBytes);  // what its frames would have left clean
  }
  throw std::runtime_error(text);
}

// Completes a collective of threads [begin, end) if all of them have reached the same one.
bool release(unsigned begin, unsigned end, bool barrier) {
  const char* collective = fibers[begin].waits_at;
  if (collective == nullptr || (collective == kBarrier) != barrier) return false;
  for (unsigned i = begin; i < end; ++i)
    if (fibers[i].done || fibers[i].waits_at != collective) return false;
  uint32_t given[kLanes];
  for (unsigned i = begin; i < end; ++i) {
    fibers[i].waits_at = nullptr;
    if (!barrier) given[i - begin] = fibers[i].value;
  }
  if (!barrier)
    for (unsigned i = begin; i < end; ++i) fibers[i].value = given[fibers[i].source];
  return true;
}

void run_block(unsigned threads, std::minstd_rand& random) {
  static Warp warps[kMaxThreads / kLanes];
  const unsigned count = threads / kLanes;
  const auto make_runnable = [&](unsigned warp) {
    std::iota(warps[warp].runnable, warps[warp].runnable + kLanes, 0);
    warps[warp].count = kLanes;
  };
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.done = false;
    fiber.waits_at = nullptr;
    begin_at(fiber.context, fiber.stack, fiber_main);
  }
  for (unsigned w = 0; w < count; ++w) make_runnable(w);
  unsigned left = threads, warp = 0;
  // A warp, its lanes in random order, mostly runs ahead until it has to wait, which is what betrays a missing barrier.
  while (left > 0) {
    if (count > 1 && random() % 64 == 0) warp = unsigned(random() % count);
    while (warps[warp].count == 0) warp = unsigned(random() % count);
    Warp& lanes = warps[warp];
    std::swap(lanes.runnable[random() % lanes.count], lanes.runnable[lanes.count - 1]);
    const unsigned thread = warp * kLanes + lanes.runnable[--lanes.count];
    --left;
    running = thread;
    threadIdx.x = thread;
    switch_to(scheduler, fibers[thread].context);
    if (failure != nullptr) fail(failure, threads);
    if (lanes.count == 0 && release(warp * kLanes, (warp + 1) * kLanes, false)) {
      make_runnable(warp);
      left += kLanes;
    }
    if (left == 0 && release(0, threads, true)) {
      for (unsigned w = 0; w < count; ++w) make_runnable(w);
      left = threads;
    }
  }
  for (unsigned i = 0; i < threads; ++i)
    if (!fibers[i].done) fail("threads diverged before a collective", threads);
}

}  // namespace

namespace emulation {

void run(unsigned blocks, unsigned threads, void (*call)(const void*), const void* closure) {
  std::minstd_rand random(seed * 2654435761u + 1);
  kernel = call;
  arguments = closure;
  failure = nullptr;
  blockDim.x = threads;
  if (fibers.size() < threads) fibers.resize(threads);
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  for (const unsigned block : order) {
    blockIdx.x = block;
    run_block(threads, random);
  }
}

void barrier() { wait_at(kBarrier); }

uint32_t shuffle(const char* name, unsigned mask, uint32_t value, unsigned lane) {
  if (mask != 0xffffffffu) {
    failure = "a shuffle of part of a warp";
    wait_at(name);  // for good
  }
  Fiber& self = fibers[running];
  self.value = value;
  self.source = lane;
  wait_at(name);
  return self.value;
}

}  // namespace emulation
