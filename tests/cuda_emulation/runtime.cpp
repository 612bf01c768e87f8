// A CUDA runtime and the cards below it, of which torch knows nothing: tensors are on the CPU, and what csrc's host code
// asks torch about devices and streams through its C interface is answered here. Whatever a card would not forgive, or
// would forgive today only, throws std::runtime_error, which torch hands to Python.
#include <dlfcn.h>
#include <pthread.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "emulator.h"
#include "runtime.h"

namespace emulation {
namespace {

constexpr int kCard = 2;  // where a tensor is that nobody has placed: not where everything is by default
std::map<const void*, int> placed;
int card = 0, guards = 0, calls = 0, launches = 0;
cudaError_t next_error = cudaSuccess, last_error = cudaSuccess;

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("emulation: " + what); }

// Another one in every call of an op, so that one that was kept from the last call is noticed.
cudaStream_t stream_of(int device) {
  return reinterpret_cast<cudaStream_t>(uintptr_t(0x5eed0000 + 16 * calls + device));
}

struct Range {
  uintptr_t begin, end;
};

Range stack_of_this_thread() {
  pthread_attr_t attributes;
  void* begin = nullptr;
  size_t bytes = 0;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &begin, &bytes);
  pthread_attr_destroy(&attributes);
  return {uintptr_t(begin), uintptr_t(begin) + bytes};
}

void check_dimensions(const char* what, dim3 sizes, unsigned limit) {
  const auto text = std::to_string(sizes.x) + " x " + std::to_string(sizes.y) + " x " + std::to_string(sizes.z);
  if (sizes.x == 0 || sizes.y == 0 || sizes.z == 0) fail("an empty " + std::string(what) + ", " + text);
  if (sizes.y != 1 || sizes.z != 1) fail("a " + std::string(what) + " of " + text + "; only x is emulated");
  if (sizes.x > limit) fail("a " + std::string(what) + " of " + text + "; at most " + std::to_string(limit));
}

template <class Function>
Function* next(const char* name) {
  void* found = dlsym(RTLD_NEXT, name);
  if (found == nullptr) fail(std::string("torch has no ") + name);
  return reinterpret_cast<Function*>(found);
}

}  // namespace

void check_stream(const char* what, cudaStream_t stream) {
  if (guards == 0) fail(std::string(what) + " without a device guard");
  if (stream == nullptr) fail(std::string(what) + " on the default stream");
  if (stream != stream_of(card))
    fail(std::string(what) + " on a stream that is not the current one of card " + std::to_string(card));
}

int current_card() { return guards > 0 ? card : -1; }

void forbid(const char* call) { fail(std::string(call) + " is called: it waits for the card, or takes its memory"); }

cudaError_t launch(void (*call)(const void*), const void* closure, bool null_kernel, dim3 grid, dim3 block,
                   size_t shared, cudaStream_t stream, const void* parameters, size_t bytes) {
  if (next_error != cudaSuccess) {
    last_error = next_error;
    next_error = cudaSuccess;
    return last_error;
  }
  check_stream("a launch", stream);
  if (null_kernel) fail("a launch of no kernel");
  check_dimensions("grid", grid, INT32_MAX);
  check_dimensions("block", block, kMaxThreads);
  if (block.x % kLanes != 0) fail("a block of " + std::to_string(block.x) + " threads, which are no whole warps");
  if (shared != 0) fail("dynamic shared memory, which is not emulated");
  static thread_local const Range stack = stack_of_this_thread();
  for (size_t i = 0; i + sizeof(uintptr_t) <= bytes; i += sizeof(uintptr_t)) {
    uintptr_t word;
    std::memcpy(&word, static_cast<const char*>(parameters) + i, sizeof word);
    if (word >= stack.begin && word < stack.end) fail("a kernel is given a pointer to the host's stack");
  }
  ++launches;
  run(grid.x, block.x, call, closure);
  return cudaSuccess;
}

}  // namespace emulation

cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice ? "no kernel image is available for execution on the device"
                                                  : "an error of the emulation's";
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  emulation::check_stream("cudaMemcpyAsync", stream);
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  emulation::check_stream("cudaMemsetAsync", stream);
  std::memset(to, value, bytes);
  return cudaSuccess;
}

// Torch's C interface, as far as it knows of cards. The linker prefers these to torch's own, in this library alone.
extern "C" {

AOTITorchError aoti_torch_library_init_impl(const char* ns, const char* key, const char* file, uint32_t line,
                                            TorchLibraryHandle* library) {
  static const auto real = emulation::next<decltype(aoti_torch_library_init_impl)>("aoti_torch_library_init_impl");
  return real(ns, std::string(key) == "CUDA" ? "CPU" : key, file, line, library);
}

AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* device) {
  void* data = nullptr;
  const AOTITorchError error = aoti_torch_get_data_ptr(tensor, &data);
  const auto found = emulation::placed.find(data);
  *device = found == emulation::placed.end() ? emulation::kCard : found->second;
  return error;
}

AOTITorchError aoti_torch_create_device_guard(int32_t device, DeviceGuardHandle* guard) {
  if (emulation::guards++ == 0) ++emulation::calls;
  *guard = reinterpret_cast<DeviceGuardHandle>(new int(std::exchange(emulation::card, device)));
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
  int* before = reinterpret_cast<int*>(guard);
  emulation::card = *before;
  delete before;
  --emulation::guards;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = emulation::stream_of(device);
  return AOTI_TORCH_SUCCESS;
}

// For the tests.
void emulation_set_seed(unsigned seed) { emulation::seed = seed; }
void emulation_set_max_row_blocks(int64_t blocks) { emulation::max_row_blocks = blocks; }
void emulation_fail_next_launch(int error) { emulation::next_error = cudaError_t(error); }
void emulation_place(const void* data, int device) {
  if (device < 0) {
    emulation::placed.erase(data);
  } else {
    emulation::placed[data] = device;
  }
}
int emulation_launches() { return emulation::launches; }
int emulation_guards() { return emulation::guards; }
int emulation_last_error() { return emulation::last_error; }
}
