// Runs the kernel of csrc/gram_alignment/cuda.cuh in the emulator; results: the gradient, then the sums of the rows.
#include "driver.h"

#include "../../csrc/gram_alignment/cuda.cuh"

using namespace driver;
using namespace layersync;

int main(int argc, char** argv) {
  parse(argc, argv);
  const int64_t rows = integer("rows");
  const Input difference("difference");
  const Buffer sums(size_t(rows) * 4);
  GramStripParams params{difference.rows.data,
                         nullptr,
                         sums.as(),
                         rows,
                         int(integer("columns")),
                         int(integer("diagonal")),
                         float(number("margin")),
                         int(integer("kind"))};
  if (integer("gradient")) params.gradient = const_cast<void*>(params.difference);  // in place, as it is called
  const auto kernel = gram_strip_kernel_for(params, difference.type);
  emulation::launch(unsigned(rows), kRowBlockThreads, unsigned(integer("seed")), [=] { kernel(params); });
  if (integer("gradient")) write(difference.storage);
  write(sums);
  return 0;
}
