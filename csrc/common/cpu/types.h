// Storage types of the CPU kernels, as bits: arithmetic is always fp32.
#pragma once

#include <cstdint>
#include <cstring>

namespace layersync {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float to_float(float value) { return value; }

inline float to_float(bf16 value) { return bits_to_float(uint32_t(value.bits) << 16); }

inline float to_float(fp16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // inf, NaN
  if (magnitude >= 0x0400) return bits_to_float(sign | ((magnitude << 13) + 0x38000000));
  return bits_to_float(sign | float_to_bits(float(magnitude) * 0x1p-24f));  // subnormal
}

inline void from_float(float value, float* out) { *out = value; }

// Round to nearest even; NaN stays a quiet NaN.
inline void from_float(float value, bf16* out) {
  const uint32_t bits = float_to_bits(value);
  out->bits = value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void from_float(float value, fp16* out) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    out->bits = sign | 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to 65,536 or above
    out->bits = sign | 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: let fp32 addition do the rounding, as 0.5 has an ulp of 2^-24
    out->bits = sign | uint16_t(float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000);
  } else {
    out->bits = sign | uint16_t((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
  }
}

}  // namespace layersync
