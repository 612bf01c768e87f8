// Runs the kernels of csrc/cosine_alignment/cuda.cuh in the emulator; results: loss, stats, scale, gradients.
#include "driver.h"

#include "../../csrc/cosine_alignment/cuda.cuh"

using namespace driver;
using namespace layersync;

int main(int argc, char** argv) {
  parse(argc, argv);
  const int64_t rows = integer("rows"), width = integer("width");
  const bool none = integer("reduction") == 0;
  const bool student_grad = integer("student_grad"), teacher_grad = integer("teacher_grad");
  const unsigned seed = unsigned(integer("seed"));
  const Input s("student"), t("teacher");
  const Buffer weight = read(size_t(integer("has_weight") ? rows : 0) * 4);
  const float* weights = weight.as();
  const int64_t grads = integer("grads");
  const Buffer grad = read(size_t(grads) * 4);

  const RowGrid grid = row_grid(rows, cosine_row_threads(width, s.type, t.type), integer("max_blocks"));
  const Buffer loss(size_t(none ? rows : 1) * 4), scale(4), partials(grid.blocks * sizeof(float2));
  const Buffer cosine(size_t(rows) * 4), rnorm_s(size_t(rows) * 4), rnorm_t(size_t(rows) * 4);
  const CosineForwardParams forward{s.rows.data,
                                    t.rows.data,
                                    s.rows.layout,
                                    t.rows.layout,
                                    rows,
                                    int(width),
                                    grid,
                                    weights,
                                    float(number("eps")),
                                    cosine.as(),
                                    rnorm_s.as(),
                                    rnorm_t.as(),
                                    none ? loss.as() : nullptr,
                                    none ? nullptr : partials.as<float2>(),
                                    scale.as()};
  const auto forward_kernel = cosine_forward_kernel_for(s.type, t.type, grid.row_threads);
  emulation::launch(grid.blocks, kRowBlockThreads, seed, [=] { forward_kernel(forward); });
  if (!none) {
    const bool mean = integer("reduction") == 1;
    const CosineFinishParams finish{partials.as<float2>(), int(grid.blocks), mean, loss.as(), scale.as()};
    emulation::launch(1, kFinishThreads, seed, [=] { cosine_finish_kernel(finish); });
  }

  const Buffer grad_s(student_grad ? size_t(rows * width) * s.item : 0);
  const Buffer grad_t(teacher_grad ? size_t(rows * width) * t.item : 0);
  if (student_grad || teacher_grad) {
    const Input &a = student_grad ? s : t, &b = student_grad ? t : s;
    const CosineBackwardParams backward{a.rows.data,
                                        b.rows.data,
                                        a.rows.layout,
                                        b.rows.layout,
                                        rows,
                                        int(width),
                                        grid,
                                        weights,
                                        cosine.as(),
                                        (student_grad ? rnorm_s : rnorm_t).as(),
                                        (student_grad ? rnorm_t : rnorm_s).as(),
                                        grad.as(),
                                        grads > 1 ? 1 : 0,
                                        scale.as(),
                                        (student_grad ? grad_s : grad_t).as<void>(),
                                        grad_t.as<void>()};
    const auto kernel = cosine_backward_kernel_for(a.type, b.type, student_grad && teacher_grad, grid.row_threads);
    emulation::launch(grid.blocks, kRowBlockThreads, seed, [=] { kernel(backward); });
  }
  for (const Buffer* buffer : {&loss, &cosine, &rnorm_s, &rnorm_t, &scale, &grad_s, &grad_t}) write(*buffer);
  return 0;
}
