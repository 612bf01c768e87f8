// Runs the kernel of csrc/spatial_norm/cuda.cuh in the emulator; results: those of the raw op.
#include "driver.h"

#include "../../csrc/spatial_norm/cuda.cuh"

using namespace driver;
using namespace layersync;

int main(int argc, char** argv) {
  parse(argc, argv);
  const int64_t samples = integer("samples"), tokens = integer("tokens"), width = integer("width");
  const Input x("x");
  const Buffer y(size_t(samples * tokens * width) * x.item);
  SpatialNormParams params{
      x.rows, y.as<void>(), int(tokens), int(width), 0, float(number("kept_mean")), float(number("eps"))};
  const SpatialNormPlan plan = spatial_norm_plan(params, x.type);
  params.tiles = plan.tiles;
  emulation::launch(unsigned(samples * plan.tiles), kSpatialThreads, unsigned(integer("seed")),
                    [=] { plan.kernel(params); });
  write(y);
  return 0;
}
