// Vec: as many floats as one register of the instruction set holds, and what kernels do with them.
// One of five: AVX-512 (16), AVX2 (8), SSE2 (4), NEON (4), or plain C++ on four floats. Error bounds
// stand beside the functions. -DRECSYS_PLAIN in CXXFLAGS takes the last where there is SSE2, to test it.
#pragma once

#include <cmath>
#include <cstring>

#include "runtime.h"

#if defined(RECSYS_ISA_AVX512) || defined(RECSYS_ISA_AVX2)
#include <immintrin.h>
#elif defined(__aarch64__) || defined(_M_ARM64)
#include <arm_neon.h>
#define RECSYS_NEON 1
#elif (defined(__SSE2__) || defined(_M_X64)) && !defined(RECSYS_PLAIN)
#include <immintrin.h>
#define RECSYS_SSE2 1
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#define RECSYS_INLINE __forceinline
#define RECSYS_RESTRICT __restrict
#else
#define RECSYS_INLINE inline __attribute__((always_inline))
#define RECSYS_RESTRICT __restrict__
#endif

namespace {

// Bring the cache lines of [p, p + bytes) near, for a read that is some microseconds away.
RECSYS_INLINE void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    const char* line = static_cast<const char*>(p) + i;
#if !defined(_MSC_VER) || defined(__clang__)
    __builtin_prefetch(line, 0, 2);
#elif defined(_M_X64)
    _mm_prefetch(line, _MM_HINT_T1);
#elif defined(_M_ARM64)
    __prefetch(line);
#endif
  }
}

// Numbers below the smallest normal one count as zero for as long as one of these lives, on its thread.
// A product of many decays ends there, and a processor takes a hundred cycles for each such operand.
class FlushTiny {
 public:
#if defined(RECSYS_ISA_AVX512) || defined(RECSYS_ISA_AVX2) || defined(RECSYS_SSE2)
  FlushTiny() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }  // results and operands
  ~FlushTiny() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
#elif defined(RECSYS_NEON) && defined(__GNUC__)
  FlushTiny() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    const uint64_t flushing = before_ | (uint64_t{1} << 24);
    asm volatile("msr fpcr, %0" : : "r"(flushing));
  }
  ~FlushTiny() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#else
  FlushTiny() {}
  ~FlushTiny() {}

 private:
#endif
  FlushTiny(const FlushTiny&);
  FlushTiny& operator=(const FlushTiny&);
};

RECSYS_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
RECSYS_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
RECSYS_INLINE float bf16_to_float(uint16_t value) {
  return bits_to_float(static_cast<uint32_t>(value) << 16);
}
RECSYS_INLINE uint16_t float_to_bf16(float value) {  // to nearest, ties to even, NaN stays NaN
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// As Vec::exp2, for registers without a scaling instruction: a polynomial on [-.5, .5], and the integer
// part put into the exponent's bits.
template <class V>
RECSYS_INLINE V exp2_by_bits(V v) {
  // min and max give their second operand where one is NaN.
  const V x = V::min(V::all(128.f), V::max(V::all(-126.f), v));
  const V magic = V::all(12582912.f);  // 1.5 2^23
  const V shifted = x + magic;
  const V r = x - (shifted - magic);
  V p = V::all(1.32647271e-3f);
  p = V::fma(p, r, V::all(9.67151286e-3f));
  p = V::fma(p, r, V::all(5.55073375e-2f));
  p = V::fma(p, r, V::all(.240222421f));
  p = V::fma(p, r, V::all(.693146978f));
  p = V::fma(p, r, V::all(1.f));
  return V::scale(p, shifted);
}

#if defined(RECSYS_ISA_AVX512)

alignas(64) constexpr float kExp2Table[32] = {  // 2^(j/32)
    1.f, 1.0218972f, 1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f, 1.13878858f, 1.1637249f,
    1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f,
    1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.5759809f, 1.61049032f, 1.64575553f,
    1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f, 1.8340081f, 1.87416768f, 1.91520655f, 1.95714414f};

struct Vec {
  static constexpr int size = 16;
  __m512 v;

  static RECSYS_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
  static RECSYS_INLINE Vec all(float x) { return {_mm512_set1_ps(x)}; }
  static RECSYS_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static RECSYS_INLINE Vec load_bf16(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  RECSYS_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  // Past the caches, to an aligned address; other threads see it after end_of_stream().
  RECSYS_INLINE void stream(float* p) const { _mm512_stream_ps(p, v); }
  static RECSYS_INLINE void end_of_stream() { _mm_sfence(); }
  RECSYS_INLINE void store_bf16(uint16_t* p) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    up = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
  }

  friend RECSYS_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend RECSYS_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend RECSYS_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend RECSYS_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  // a * b + c
  static RECSYS_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  // The larger; b where either is NaN.
  static RECSYS_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  static RECSYS_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
  RECSYS_INLINE Vec abs() const { return {_mm512_abs_ps(v)}; }
  // a where x's sign bit is set, else b
  static RECSYS_INLINE Vec where_negative(Vec x, Vec a, Vec b) {
    return {_mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x.v)), b.v, a.v)};
  }
  // Bit i: lane i of a is not at most that of b; so where either is NaN.
  static RECSYS_INLINE uint32_t not_at_most(Vec a, Vec b) {
    return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ);
  }
  RECSYS_INLINE float sum() const { return _mm512_reduce_add_ps(v); }
  // Lane i: the sum of two lanes of a, of b if i has bit K; two that agree with i in all bits below.
  // So folding by one K after another, smallest first, sums the lanes of many vectors at once.
  template <int K>
  static RECSYS_INLINE Vec fold(Vec a, Vec b) {
    static_assert(K == 1 || K == 2 || K == 4 || K == 8, "");
    if (K == 1) return {_mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v))};
    if (K == 2)
      return {_mm512_add_ps(_mm512_mask_blend_ps(0xcccc, a.v, b.v), _mm512_shuffle_ps(a.v, b.v, 0x4e))};
    if (K == 4) {
      const __m512 other = _mm512_mask_blend_ps(0x0f0f, a.v, b.v);
      return {_mm512_add_ps(_mm512_mask_blend_ps(0xf0f0, a.v, b.v),
                            _mm512_shuffle_f32x4(other, other, 0xb1))};
    }
    return {_mm512_add_ps(_mm512_mask_blend_ps(0xff00, a.v, b.v), _mm512_shuffle_f32x4(a.v, b.v, 0x4e))};
  }

  // 2^v, relative error below 2e-7 and exact at 0; 0 far below, infinity far above, NaN stays NaN.
  // 2^x = 2^floor(s) 2^frac(s) 2^(x - s) with s = x rounded to 1/32: a shuffle of a table in two
  // registers, and a parabola. Fewer multiplications than a polynomial over the whole of [-.5, .5].
  RECSYS_INLINE Vec exp2() const {
    Vec x[1] = {*this};
    exp2<false>(x);
    return x[0];
  }
  // Of several: a step at a time for all of them, because a processor sees only so far ahead. The
  // parabola's slope at 0 is too steep by 1.5e-5 of itself, and so is the rate of a slow decay. Cubic
  // takes one multiplication more, and only rounding errors are left.
  template <bool Cubic, int N>
  static RECSYS_INLINE void exp2(Vec (&x)[N]) {
    // Sums with a rounding mode of their own: compilers would fuse them with the multiplication that
    // v is, twice, and multiplications are what there are most of.
    const __m512 magic = _mm512_set1_ps(393216.f);  // 1.5 2^18: the last mantissa bits count 1/32
    __m512 shifted[N], s[N], t[N];
    for (int n = 0; n < N; ++n) shifted[n] = _mm512_add_round_ps(x[n].v, magic, _MM_FROUND_CUR_DIRECTION);
    for (int n = 0; n < N; ++n) {
      s[n] = _mm512_sub_ps(shifted[n], magic);
      t[n] = _mm512_permutex2var_ps(_mm512_load_ps(kExp2Table), _mm512_castps_si512(shifted[n]),
                                    _mm512_load_ps(kExp2Table + 16));
    }
    for (int n = 0; n < N; ++n) {
      const __m512 r = _mm512_sub_round_ps(x[n].v, s[n], _MM_FROUND_CUR_DIRECTION);
      __m512 q;
      if (Cubic) {
        q = _mm512_fmadd_ps(_mm512_set1_ps(5.55041087e-2f), r, _mm512_set1_ps(.240226507f));
        q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(.693147181f));
      } else {
        q = _mm512_fmadd_ps(_mm512_set1_ps(.240226763f), r, _mm512_set1_ps(.693157334f));
      }
      t[n] = _mm512_fmadd_ps(q, _mm512_mul_ps(r, t[n]), t[n]);
    }
    for (int n = 0; n < N; ++n) x[n].v = _mm512_scalef_ps(t[n], s[n]);
  }
};

#elif defined(RECSYS_ISA_AVX2)

struct Vec {
  static constexpr int size = 8;
  __m256 v;

  static RECSYS_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
  static RECSYS_INLINE Vec all(float x) { return {_mm256_set1_ps(x)}; }
  static RECSYS_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static RECSYS_INLINE Vec load_bf16(const uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
  }
  RECSYS_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  RECSYS_INLINE void stream(float* p) const { _mm256_stream_ps(p, v); }
  static RECSYS_INLINE void end_of_stream() { _mm_sfence(); }
  RECSYS_INLINE void store_bf16(uint16_t* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }

  friend RECSYS_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend RECSYS_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend RECSYS_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend RECSYS_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  static RECSYS_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static RECSYS_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  static RECSYS_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
  RECSYS_INLINE Vec abs() const { return {_mm256_andnot_ps(_mm256_set1_ps(-0.f), v)}; }
  static RECSYS_INLINE Vec where_negative(Vec x, Vec a, Vec b) {
    return {_mm256_blendv_ps(b.v, a.v, x.v)};
  }
  static RECSYS_INLINE uint32_t not_at_most(Vec a, Vec b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NLE_UQ)));
  }
  RECSYS_INLINE float sum() const {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  template <int K>
  static RECSYS_INLINE Vec fold(Vec a, Vec b) {
    static_assert(K == 1 || K == 2 || K == 4, "");
    if (K == 1) return {_mm256_add_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v))};
    if (K == 2)
      return {_mm256_add_ps(_mm256_blend_ps(a.v, b.v, 0xcc), _mm256_shuffle_ps(a.v, b.v, 0x4e))};
    return {_mm256_add_ps(_mm256_blend_ps(a.v, b.v, 0xf0), _mm256_permute2f128_ps(a.v, b.v, 0x21))};
  }

  // 2^v, relative error below 2e-7 and exact at 0; 2^-126 far below, infinity or NaN far above.
  RECSYS_INLINE Vec exp2() const { return exp2_by_bits(*this); }
  // p 2^n, where the last bits of `shifted` are those of the integer n.
  static RECSYS_INLINE Vec scale(Vec p, Vec shifted) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23);
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.v), exponent))};
  }
};

#elif defined(RECSYS_SSE2)

struct Vec {
  static constexpr int size = 4;
  __m128 v;

  static RECSYS_INLINE Vec zero() { return {_mm_setzero_ps()}; }
  static RECSYS_INLINE Vec all(float x) { return {_mm_set1_ps(x)}; }
  static RECSYS_INLINE Vec load(const float* p) { return {_mm_loadu_ps(p)}; }
  static RECSYS_INLINE Vec load_bf16(const uint16_t* p) {
    const __m128i half = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return {_mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), half))};
  }
  RECSYS_INLINE void store(float* p) const { _mm_storeu_ps(p, v); }
  RECSYS_INLINE void stream(float* p) const { _mm_stream_ps(p, v); }
  static RECSYS_INLINE void end_of_stream() { _mm_sfence(); }
  RECSYS_INLINE void store_bf16(uint16_t* p) const {
    float part[4];
    store(part);
    for (int i = 0; i < 4; ++i) p[i] = float_to_bf16(part[i]);
  }

  friend RECSYS_INLINE Vec operator+(Vec a, Vec b) { return {_mm_add_ps(a.v, b.v)}; }
  friend RECSYS_INLINE Vec operator-(Vec a, Vec b) { return {_mm_sub_ps(a.v, b.v)}; }
  friend RECSYS_INLINE Vec operator*(Vec a, Vec b) { return {_mm_mul_ps(a.v, b.v)}; }
  friend RECSYS_INLINE Vec operator/(Vec a, Vec b) { return {_mm_div_ps(a.v, b.v)}; }
  static RECSYS_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  static RECSYS_INLINE Vec max(Vec a, Vec b) { return {_mm_max_ps(a.v, b.v)}; }
  static RECSYS_INLINE Vec min(Vec a, Vec b) { return {_mm_min_ps(a.v, b.v)}; }
  RECSYS_INLINE Vec abs() const { return {_mm_andnot_ps(_mm_set1_ps(-0.f), v)}; }
  static RECSYS_INLINE Vec where_negative(Vec x, Vec a, Vec b) {
    const __m128 mask = _mm_castsi128_ps(_mm_srai_epi32(_mm_castps_si128(x.v), 31));
    return {_mm_or_ps(_mm_and_ps(mask, a.v), _mm_andnot_ps(mask, b.v))};
  }
  static RECSYS_INLINE uint32_t not_at_most(Vec a, Vec b) {
    return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpnle_ps(a.v, b.v)));
  }
  RECSYS_INLINE float sum() const {
    const __m128 half = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
  }
  template <int K>
  static RECSYS_INLINE Vec fold(Vec a, Vec b) {
    static_assert(K == 1 || K == 2, "");
    if (K == 1) return {_mm_add_ps(_mm_unpacklo_ps(a.v, b.v), _mm_unpackhi_ps(a.v, b.v))};
    return {_mm_add_ps(_mm_movelh_ps(a.v, b.v), _mm_movehl_ps(b.v, a.v))};
  }

  RECSYS_INLINE Vec exp2() const { return exp2_by_bits(*this); }
  static RECSYS_INLINE Vec scale(Vec p, Vec shifted) {
    const __m128i exponent = _mm_slli_epi32(_mm_castps_si128(shifted.v), 23);
    return {_mm_castsi128_ps(_mm_add_epi32(_mm_castps_si128(p.v), exponent))};
  }
};

#elif defined(RECSYS_NEON)

struct Vec {
  static constexpr int size = 4;
  float32x4_t v;

  static RECSYS_INLINE Vec zero() { return {vdupq_n_f32(0)}; }
  static RECSYS_INLINE Vec all(float x) { return {vdupq_n_f32(x)}; }
  static RECSYS_INLINE Vec load(const float* p) { return {vld1q_f32(p)}; }
  static RECSYS_INLINE Vec load_bf16(const uint16_t* p) {
    return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))};
  }
  RECSYS_INLINE void store(float* p) const { vst1q_f32(p, v); }
  RECSYS_INLINE void stream(float* p) const { store(p); }
  static RECSYS_INLINE void end_of_stream() {}
  RECSYS_INLINE void store_bf16(uint16_t* p) const {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    vst1_u16(p, vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), up, quiet), 16));
  }

  friend RECSYS_INLINE Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
  friend RECSYS_INLINE Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
  friend RECSYS_INLINE Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
  friend RECSYS_INLINE Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
  static RECSYS_INLINE Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  static RECSYS_INLINE Vec max(Vec a, Vec b) { return {vmaxq_f32(a.v, b.v)}; }  // NaN wins
  static RECSYS_INLINE Vec min(Vec a, Vec b) { return {vminq_f32(a.v, b.v)}; }
  RECSYS_INLINE Vec abs() const { return {vabsq_f32(v)}; }
  static RECSYS_INLINE Vec where_negative(Vec x, Vec a, Vec b) {
    return {vbslq_f32(vcltq_s32(vreinterpretq_s32_f32(x.v), vdupq_n_s32(0)), a.v, b.v)};
  }
  static RECSYS_INLINE uint32_t not_at_most(Vec a, Vec b) {
    const uint32_t bits[4] = {1, 2, 4, 8};
    return vaddvq_u32(vbicq_u32(vld1q_u32(bits), vcleq_f32(a.v, b.v)));
  }
  RECSYS_INLINE float sum() const { return vaddvq_f32(v); }
  template <int K>
  static RECSYS_INLINE Vec fold(Vec a, Vec b) {
    static_assert(K == 1 || K == 2, "");
    if (K == 1) return {vaddq_f32(vtrn1q_f32(a.v, b.v), vtrn2q_f32(a.v, b.v))};
    return {vaddq_f32(vcombine_f32(vget_low_f32(a.v), vget_low_f32(b.v)),
                      vcombine_f32(vget_high_f32(a.v), vget_high_f32(b.v)))};
  }

  RECSYS_INLINE Vec exp2() const { return exp2_by_bits(*this); }
  static RECSYS_INLINE Vec scale(Vec p, Vec shifted) {
    const int32x4_t exponent = vshlq_n_s32(vreinterpretq_s32_f32(shifted.v), 23);
    return {vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p.v), exponent))};
  }
};

#else

struct Vec {
  static constexpr int size = 4;
  float v[4];

  template <class F>
  static RECSYS_INLINE Vec each(const F& f) {
    return {{f(0), f(1), f(2), f(3)}};
  }
  static RECSYS_INLINE Vec zero() { return all(0); }
  static RECSYS_INLINE Vec all(float x) { return {{x, x, x, x}}; }
  static RECSYS_INLINE Vec load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static RECSYS_INLINE Vec load_bf16(const uint16_t* p) {
    return each([&](int i) { return bf16_to_float(p[i]); });
  }
  RECSYS_INLINE void store(float* p) const { std::memcpy(p, v, sizeof v); }
  RECSYS_INLINE void stream(float* p) const { store(p); }
  static RECSYS_INLINE void end_of_stream() {}
  RECSYS_INLINE void store_bf16(uint16_t* p) const {
    for (int i = 0; i < 4; ++i) p[i] = float_to_bf16(v[i]);
  }

  friend RECSYS_INLINE Vec operator+(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  friend RECSYS_INLINE Vec operator-(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  friend RECSYS_INLINE Vec operator*(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  friend RECSYS_INLINE Vec operator/(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
  }
  static RECSYS_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  static RECSYS_INLINE Vec max(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static RECSYS_INLINE Vec min(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  RECSYS_INLINE Vec abs() const {
    return each([&](int i) { return bits_to_float(float_to_bits(v[i]) & 0x7fffffffu); });
  }
  static RECSYS_INLINE Vec where_negative(Vec x, Vec a, Vec b) {
    return each([&](int i) { return float_to_bits(x.v[i]) >> 31 ? a.v[i] : b.v[i]; });
  }
  static RECSYS_INLINE uint32_t not_at_most(Vec a, Vec b) {
    uint32_t bits = 0;
    for (int i = 0; i < 4; ++i) bits |= static_cast<uint32_t>(!(a.v[i] <= b.v[i])) << i;
    return bits;
  }
  RECSYS_INLINE float sum() const { return (v[0] + v[2]) + (v[1] + v[3]); }
  template <int K>
  static RECSYS_INLINE Vec fold(Vec a, Vec b) {
    return each([&](int i) { return i & K ? b.v[i] + b.v[i ^ K] : a.v[i] + a.v[i ^ K]; });
  }

  RECSYS_INLINE Vec exp2() const { return exp2_by_bits(*this); }
  static RECSYS_INLINE Vec scale(Vec p, Vec shifted) {
    return each([&](int i) {
      return bits_to_float(float_to_bits(p.v[i]) + (float_to_bits(shifted.v[i]) << 23));
    });
  }
};

#endif

// 2^x of each. Cubic: with AVX-512, without the bias of slow decays; others have none.
#if defined(RECSYS_ISA_AVX512)
constexpr bool kHasCubic = true;
#else
constexpr bool kHasCubic = false;
#endif
template <bool Cubic, int N>
RECSYS_INLINE void exp2(Vec (&x)[N]) {
#if defined(RECSYS_ISA_AVX512)
  Vec::exp2<Cubic>(x);
#else
  for (int n = 0; n < N; ++n) x[n] = x[n].exp2();
#endif
}

constexpr float kLog2e = 1.44269504f;

// e^x, relative error below 5e-7 + 6e-8 |x|.
RECSYS_INLINE Vec exp(Vec x) { return (x * Vec::all(kLog2e)).exp2(); }

// 1 / (1 + e^-x)
RECSYS_INLINE Vec sigmoid(Vec x) {
  const Vec one = Vec::all(1.f);
  return one / (one + exp(Vec::zero() - x));
}

// log(1 + e^x), and its derivative sigmoid(x); relative error below 1e-6. Nothing overflows, because
// only e^-|x| is taken.
RECSYS_INLINE Vec softplus(Vec x, Vec* derivative) {
  const Vec one = Vec::all(1.f), zero = Vec::zero();
  const Vec y = exp(zero - x.abs());
  Vec p = Vec::all(5.23268134e-3f);  // log(1 + y) / y on [0, 1]
  p = Vec::fma(p, y, Vec::all(-2.95051865e-2f));
  p = Vec::fma(p, y, Vec::all(7.82258653e-2f));
  p = Vec::fma(p, y, Vec::all(-.136632382f));
  p = Vec::fma(p, y, Vec::all(.19106003f));
  p = Vec::fma(p, y, Vec::all(-.248429812f));
  p = Vec::fma(p, y, Vec::all(.333190967f));
  p = Vec::fma(p, y, Vec::all(-.499994931f));
  p = Vec::fma(p, y, Vec::all(.99999997f));
  *derivative = Vec::where_negative(x, y, one) / (one + y);
  return Vec::fma(p, y, Vec::max(zero, x));
}

}  // namespace
