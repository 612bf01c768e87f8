// Device code with deliberate faults, each of which the emulator has to catch: ./faults NAME SEED
#include "emulator.h"

namespace {

constexpr int kThreads = 64;

// Every thread passes its number to its neighbour in the other warp; prints what arrived, weighted by place squared.
void exchange(bool barrier, unsigned seed) {
  static std::vector<int> out(kThreads);
  emulation::launch(1, kThreads, seed, [=] {
    __shared__ int slots[kThreads];
    slots[threadIdx.x] = int(threadIdx.x);
    if (barrier) __syncthreads();
    out[threadIdx.x] = slots[threadIdx.x ^ 32];
  });
  long sum = 0;
  for (int i = 0; i < kThreads; ++i) sum += long(out[i]) * i * i;
  std::printf("%ld\n", sum);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const std::string name = argv[1];
  const unsigned seed = unsigned(std::stoul(argv[2]));
  std::vector<float> memory(kThreads);
  float* data = memory.data();
  if (name == "exchange") exchange(true, seed);
  if (name == "missing-barrier") exchange(false, seed);
  if (name == "out-of-bounds") emulation::launch(1, kThreads, seed, [=] { data[threadIdx.x + 1] = 1; });
  if (name == "misaligned")
    emulation::launch(1, kThreads, seed, [=] {
      struct alignas(16) Four {
        float x[4];
      };
      if (threadIdx.x == 0) reinterpret_cast<Four*>(data + 1)->x[0] = 1;
    });
  if (name == "diverged-barrier")
    emulation::launch(1, kThreads, seed, [] {
      if (threadIdx.x < 40) __syncthreads();
    });
  if (name == "diverged-shuffle")
    emulation::launch(1, kThreads, seed, [] {
      if (threadIdx.x % 2) __shfl_xor_sync(0xffffffffu, 1.f, 1);
    });
  return 0;
}
