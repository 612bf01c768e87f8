// What the programs that run kernels in the emulator share: parameters by name on the command line, tensors as raw
// bytes on stdin, results as raw bytes on stdout. harness.py is the other end.
#pragma once

#include "emulator.h"

#include "../../csrc/common/cuda/row_kernel.cuh"

#include <map>
#include <memory>
#include <string>

namespace driver {

inline std::map<std::string, double> options;

inline void parse(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string text = argv[i];
    const size_t equals = text.find('=');
    options[text.substr(0, equals)] = std::stod(text.substr(equals + 1));
  }
}

inline double number(const std::string& name) { return options.at(name); }
inline int64_t integer(const std::string& name) { return int64_t(options.at(name)); }

// Heap memory of exactly the size asked for, so that the sanitizer sees every step beyond it; outputs begin as NaN.
struct Buffer {
  explicit Buffer(size_t bytes) : size(bytes), data(new char[bytes]) { std::memset(data.get(), 0xff, bytes); }

  // Null where there is nothing, as the kernels are told.
  template <class T = float>
  T* as() const {
    return size == 0 ? nullptr : reinterpret_cast<T*>(data.get());
  }

  size_t size;
  std::unique_ptr<char[]> data;
};

inline Buffer read(size_t bytes) {
  Buffer buffer(bytes);
  if (std::fread(buffer.data.get(), 1, bytes, stdin) != bytes) std::exit(2);
  return buffer;
}

inline void write(const Buffer& buffer) { std::fwrite(buffer.data.get(), 1, buffer.size, stdout); }

inline size_t item_size(int type) { return type == 0 ? 4 : 2; }

// A tensor of rows of any stride; of type −1 if it is missing.
struct Input {
  explicit Input(const std::string& name)
      : type(int(integer(name + "_type"))),
        item(item_size(type)),
        storage(read(type < 0 ? 0 : size_t(integer(name + "_storage")) * item)) {
    if (type < 0) return;
    rows.data = storage.data.get() + integer(name + "_offset") * int64_t(item);
    rows.layout = {integer(name + "_inner"), integer(name + "_outer_stride"), integer(name + "_inner_stride")};
  }

  int type;
  size_t item;
  Buffer storage;
  layersync::RowInput rows;
};

}  // namespace driver
