// Runs the kernels of csrc/cosine_alignment/cuda.cuh in the emulator: parameters by name on the command line, tensors
// as raw bytes on stdin, results as raw bytes on stdout (loss, stats, scale, gradients). See test_cuda_emulation.py.
#include "emulator.h"

#include "../../csrc/cosine_alignment/cuda.cuh"

#include <map>
#include <memory>
#include <string>

namespace {

using namespace layersync;

std::map<std::string, double> options;

int64_t integer(const std::string& name) { return int64_t(options.at(name)); }

// Heap memory of exactly the size asked for, so that the sanitizer sees every step beyond it; outputs begin as NaN.
struct Buffer {
  explicit Buffer(size_t bytes) : size(bytes), data(new char[bytes]) { std::memset(data.get(), 0xff, bytes); }

  template <class T = float>
  T* as() const {
    return reinterpret_cast<T*>(data.get());
  }

  size_t size;
  std::unique_ptr<char[]> data;
};

Buffer read(size_t bytes) {
  Buffer buffer(bytes);
  if (std::fread(buffer.data.get(), 1, bytes, stdin) != bytes) std::exit(2);
  return buffer;
}

void write(const Buffer& buffer) { std::fwrite(buffer.data.get(), 1, buffer.size, stdout); }

struct Side {
  explicit Side(const std::string& name)
      : type(int(integer(name + "_type"))),
        item(type == 0 ? 4 : 2),
        storage(read(size_t(integer(name + "_storage")) * item)),
        data(storage.data.get() + integer(name + "_offset") * int64_t(item)),
        layout{integer(name + "_inner"), integer(name + "_outer_stride"), integer(name + "_inner_stride")} {}

  int type;
  size_t item;
  Buffer storage;
  const void* data;
  RowLayout layout;
};

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string text = argv[i];
    const size_t equals = text.find('=');
    options[text.substr(0, equals)] = std::stod(text.substr(equals + 1));
  }
  const int64_t rows = integer("rows"), width = integer("width");
  const bool none = integer("reduction") == 0;
  const bool student_grad = integer("student_grad"), teacher_grad = integer("teacher_grad");
  const unsigned seed = unsigned(integer("seed"));
  const Side s("student"), t("teacher");
  const Buffer weight = read(size_t(integer("has_weight") ? rows : 0) * 4);
  const float* weights = integer("has_weight") ? weight.as() : nullptr;
  const int64_t grads = integer("grads");
  const Buffer grad = read(size_t(grads) * 4);

  const RowGrid grid = row_grid(rows, cosine_row_vectors(width, s.type, t.type), integer("max_blocks"));
  const Buffer loss(size_t(none ? rows : 1) * 4), scale(4), partials(grid.blocks * sizeof(float2));
  const Buffer cosine(size_t(rows) * 4), rnorm_s(size_t(rows) * 4), rnorm_t(size_t(rows) * 4);
  const CosineForwardParams forward{s.data, t.data, s.layout, t.layout, rows, int(width), grid, weights,
                                    float(options.at("eps")), cosine.as(), rnorm_s.as(), rnorm_t.as(),
                                    none ? loss.as() : nullptr, none ? nullptr : partials.as<float2>(), scale.as()};
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
    const Side &a = student_grad ? s : t, &b = student_grad ? t : s;
    const CosineBackwardParams backward{
        a.data, b.data, a.layout, b.layout, rows, int(width), grid, weights, cosine.as(),
        (student_grad ? rnorm_s : rnorm_t).as(), (student_grad ? rnorm_t : rnorm_s).as(), grad.as(), grads > 1 ? 1 : 0,
        scale.as(), (student_grad ? grad_s : grad_t).as<void>(), grad_t.as<void>()};
    const auto kernel = cosine_backward_kernel_for(a.type, b.type, student_grad && teacher_grad, grid.row_threads);
    emulation::launch(grid.blocks, kRowBlockThreads, seed, [=] { kernel(backward); });
  }
  for (const Buffer* buffer : {&loss, &cosine, &rnorm_s, &rnorm_t, &scale, &grad_s, &grad_t}) write(*buffer);
  return 0;
}
