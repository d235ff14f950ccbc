// What the C++ tests share. Every array is exactly as large as it must be, so that the sanitizers find an access beyond
// its end.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "luthier/cpuid.hpp"
#include "luthier/dtype.hpp"

inline void require(bool holds, const char* what, const char* file, int line) {
  if (holds) return;
  std::fprintf(stderr, "%s:%d: %s\n", file, line, what);
  std::exit(1);
}
#define REQUIRE(condition) require(condition, #condition, __FILE__, __LINE__)

inline float widen(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float out;
  std::memcpy(&out, &wide, sizeof out);
  return out;
}
inline float widen(float value) { return value; }

inline void narrow(float value, float* out) { *out = value; }
inline void narrow(float value, uint16_t* out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  *out = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class Scalar>
luthier::Dtype dtype_of();
template <>
inline luthier::Dtype dtype_of<float>() {
  return luthier::Dtype::float32;
}
template <>
inline luthier::Dtype dtype_of<uint16_t>() {
  return luthier::Dtype::bfloat16;
}

template <class Scalar>
double tolerance() {
  return dtype_of<Scalar>() == luthier::Dtype::bfloat16 ? 3e-2 : 3e-4;
}

template <class Scalar>
std::vector<Scalar> random_values(int64_t count, float scale, std::mt19937& random) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<Scalar> values(count);
  for (auto& value : values) narrow(normal(random), &value);
  return values;
}

inline bool close(double got, double want, double allowed) {
  return std::fabs(got - want) <= allowed * (1 + std::fabs(want));
}

// Each checks one instruction set with a number of threads, and returns how many problems it solved.
int check_adamw_8bit(luthier::Isa isa, int threads);
int check_attention(luthier::Isa isa, int threads);
int check_attention_decode(luthier::Isa isa, int threads);
int check_dequantise(luthier::Isa isa, int threads);
int check_elementwise(luthier::Isa isa, int threads);
int check_linear_cross_entropy(luthier::Isa isa, int threads);
int check_product(luthier::Isa isa, int threads);
int check_program(luthier::Isa isa, int threads);
int check_quantised_product(luthier::Isa isa, int threads);
