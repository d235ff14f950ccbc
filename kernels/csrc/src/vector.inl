// Vectors of one instruction set. Included by each per-ISA file, which defines LUTHIER_LANES (floats in a register),
// LUTHIER_VECTORS (registers in a panel) and LUTHIER_REGISTERS (vector registers that there are).
// Nothing here or in the files that include it may call an inline function of the standard library: the linker could
// keep this file's copy of it, compiled for this instruction set, for every caller.
#pragma once
#include <cstdint>
#include <cstring>

#include "luthier/parallel.hpp"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace luthier::detail {
namespace {

constexpr int L = LUTHIER_LANES, P = LUTHIER_LANES * LUTHIER_VECTORS;
typedef float Vec __attribute__((vector_size(L * 4)));
typedef int32_t IntVec __attribute__((vector_size(L * 4)));
typedef uint32_t Bits __attribute__((vector_size(L * 4)));
typedef uint16_t Halves __attribute__((vector_size(L * 2)));

template <class Vector, class Scalar>
Vector load_raw(const Scalar* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

Vec load(const float* p) { return load_raw<Vec>(p); }
Vec load(const uint16_t* p) { return (Vec)(__builtin_convertvector(load_raw<Halves>(p), Bits) << 16); }

void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// To bfloat16, to nearest even; NaN stays NaN.
Halves narrow(Vec v) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
  const Bits bits = (Bits)v;
  const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Bits is_number = (Bits)(v == v);
  return __builtin_convertvector((rounded & is_number) | (~is_number & 0x7fc0), Halves);
#endif
}

void store(uint16_t* p, Vec v) {
  const Halves h = narrow(v);
  std::memcpy(p, &h, sizeof h);
}

// The first `count` < L elements, the others zero; and back. The address sanitizer does not see masked accesses.
#if LUTHIER_LANES == 16 && !defined(__SANITIZE_ADDRESS__)
__mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>(count > 0 ? (1u << count) - 1 : 0); }
Vec load_part(const float* p, int64_t count) { return (Vec)_mm512_maskz_loadu_ps(first_lanes(count), p); }
Vec load_part(const uint16_t* p, int64_t count) {
  return (Vec)(__builtin_convertvector((Halves)_mm256_maskz_loadu_epi16(first_lanes(count), p), Bits) << 16);
}
void store_part(float* p, Vec v, int64_t count) { _mm512_mask_storeu_ps(p, first_lanes(count), (__m512)v); }
void store_part(uint16_t* p, Vec v, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), (__m256i)narrow(v));
}
#else
template <class Scalar>
Vec load_part(const Scalar* p, int64_t count) {
  Scalar part[L] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = p[i];
  return load(part);
}
template <class Scalar>
void store_part(Scalar* p, Vec v, int64_t count) {
  Scalar part[L];
  store(part, v);
  for (int64_t i = 0; i < count; ++i) p[i] = part[i];
}
#endif

// The same for any count; of more than L elements, the first L.
template <class Scalar>
Vec load_some(const Scalar* p, int64_t count) {
  return count >= L ? load(p) : load_part(p, count);
}
template <class Scalar>
void store_some(Scalar* p, Vec v, int64_t count) {
  if (count >= L) return store(p, v);
  store_part(p, v, count);
}

Vec select(IntVec condition, Vec yes, Vec no) { return (Vec)(((IntVec)yes & condition) | ((IntVec)no & ~condition)); }

// Lanes combined in a fixed order: halves with halves.
template <class Combine>
float fold_lanes(Vec v, Combine combine) {
  float part[L];
  store(part, v);
  for (int half = L / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] = combine(part[i], part[i + half]);
  return part[0];
}

float sum_lanes(Vec v) {
  return fold_lanes(v, [](float a, float b) { return a + b; });
}

// NaN where a lane is NaN.
float max_lanes(Vec v) {
  return fold_lanes(v, [](float a, float b) { return a > b || a != a ? a : b; });
}

// e^x for x <= 0 (Cephes' polynomial, 2 ulp); below -87 it is 0, and NaN stays NaN.
Vec exp_negative(Vec x) {
  const Vec magic = Vec{} + 12582912.0f;
  const IntVec zero_out = x < -87.0f;
  const Vec shifted = x * 1.44269504f + magic;
  const Vec n = shifted - magic;
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const IntVec scale = ((IntVec)shifted - (IntVec)magic + 127) << 23;
  y = y * (Vec)scale;
  return (Vec)((IntVec)y & ~zero_out);
}

Vec absolute(Vec x) { return (Vec)((Bits)x & 0x7fffffffu); }

// Through e^-2|x|: no overflow; small arguments by their series, where the quotient would cancel.
Vec tanh_of(Vec x) {
  const Vec size = absolute(x), e = exp_negative(size * -2.0f), square = x * x;
  const Vec quotient = (1.0f - e) / (1.0f + e);
  const Vec series = size * (1.0f + square * (-0.333333333f + square * (0.133333333f - square * 0.0539682540f)));
  const Vec positive = select(size < 0.1f, series, quotient);
  return (Vec)((Bits)positive | ((Bits)x & 0x80000000u));
}

Vec sigmoid_of(Vec x) {
  const Vec e = exp_negative(-absolute(x));
  return select(x < 0.0f, e, Vec{} + 1.0f) / (1.0f + e);
}

}  // namespace
}  // namespace luthier::detail
