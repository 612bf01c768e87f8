// Runs the GEMMs of csrc/gelu/cublaslt.h on the emulated library; results: those of the raw ops, or the error's text.
#include "cublaslt.h"

using namespace driver;
using namespace emulated_cublaslt;

int main(int argc, char** argv) {
  parse(argc, argv);
  const int64_t count = integer("count"), width = integer("width"), hidden = integer("hidden");
  const bool backward = integer("backward");
  // x, weight and perhaps a bias; or d_output, weight and the pre-activation.
  const Input rows("rows"), weight("weight"), third("third");
  const int type = rows.type == 2 ? kHalf : kBFloat16;
  const auto data = [](const Input& input) { return const_cast<void*>(input.rows.data); };
  const Buffer first(size_t(count * hidden) * 2), second(size_t(backward ? hidden : count * hidden) * 2);
  const auto stride = [](const Input& input) { return input.rows.layout.inner_stride; };
  const Gemm gemm = backward ? backward_gemm(type, count, width, hidden, data(rows), stride(rows), data(weight),
                                             stride(weight), data(third), first.as<void>(), second.as<void>())
                             : forward_gemm(type, count, width, hidden, data(rows), stride(rows), data(weight),
                                            stride(weight), data(third), first.as<void>(), second.as<void>());
  workspace_wanted = size_t(integer("workspace"));
  refuse = integer("refuse");
  Context context(api, nullptr);
  std::vector<Buffer> workspaces;
  const auto allocate = [&](size_t bytes) { return workspaces.emplace_back(bytes).as<void>(); };
  try {
    Gemm other = gemm;
    other.columns = 1;
    context.run(other, nullptr, allocate);
    context.run(gemm, nullptr, allocate);
    std::memset(first.as<void>(), 0xff, first.size);
    context.run(gemm, nullptr, allocate);  // by the plan that it knows
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "%s", error.what());
    return 3;
  }
  if (questions != 2 || workspaces.size() != (workspace_wanted > 0 ? 3 : 0)) {
    std::fprintf(stderr, "asked %d times, %zu workspaces", questions, workspaces.size());
    return 4;
  }
  for (const Buffer* buffer : {&first, &second}) write(*buffer);
  return 0;
}
