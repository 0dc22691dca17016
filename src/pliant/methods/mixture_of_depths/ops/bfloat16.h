// Values of float32 and bfloat16 from memory, computed with in float32.

#pragma once

#include <cstdint>
#include <cstring>

namespace pliant {
namespace {  // libraries of several versions may be in one process

// bfloat16 is stored as the upper half of a float.
using bf16 = uint16_t;
inline float wide(float v) { return v; }
inline float wide(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
template <class T>
inline T narrow(float v);
template <>
inline float narrow<float>(float v) { return v; }
template <>
inline bf16 narrow<bf16>(float v) {  // to the nearest, ties to even; NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<bf16>(v != v ? 0x7fc0 : rounded);
}

}  // namespace
}  // namespace pliant
