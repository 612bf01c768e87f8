// What the stubs of CUDA's libraries share.
#pragma once

#include "host/cuda_runtime.h"

namespace emulation {

// Throws unless a device guard is there and the stream is the current one of its card.
void check_stream(const char* what, cudaStream_t stream);

// That of the device guard; −1 without one.
int current_card();

}  // namespace emulation
