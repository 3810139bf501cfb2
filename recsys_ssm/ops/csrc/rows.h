// Rows of tensors to and from float buffers: adjacent elements, float32 or bfloat16.
#pragma once

#include "simd.h"

namespace {

RECSYS_INLINE Vec load(const float* p) { return Vec::load(p); }
RECSYS_INLINE Vec load(const uint16_t* p) { return Vec::load_bf16(p); }
RECSYS_INLINE void store(Vec v, float* p) { v.store(p); }
RECSYS_INLINE void store(Vec v, uint16_t* p) { v.store_bf16(p); }
RECSYS_INLINE float to_float(float x) { return x; }
RECSYS_INLINE float to_float(uint16_t x) { return bf16_to_float(x); }
RECSYS_INLINE void from_float(float x, float* p) { *p = x; }
RECSYS_INLINE void from_float(float x, uint16_t* p) { *p = float_to_bf16(x); }

template <class T>
RECSYS_INLINE void read_row(const T* from, int64_t count, float* to) {
  int64_t c = 0;
  for (; c + Vec::size <= count; c += Vec::size) load(from + c).store(to + c);
  for (; c < count; ++c) to[c] = to_float(from[c]);
}

template <class T>
RECSYS_INLINE void write_row(const float* from, int64_t count, T* to) {
  int64_t c = 0;
  for (; c + Vec::size <= count; c += Vec::size) store(Vec::load(from + c), to + c);
  for (; c < count; ++c) from_float(from[c], to + c);
}

inline void fill_zero(float* to, int64_t count) {
  if (count > 0) std::memset(to, 0, sizeof(float) * static_cast<size_t>(count));
}

}  // namespace
