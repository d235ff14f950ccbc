// Weights of 8 or 4 bits made into floats or bfloat16.
#pragma once
#include "elementwise.inl"
#include "luthier/dequantise.hpp"

namespace luthier::detail {
namespace {

typedef int8_t Bytes __attribute__((vector_size(L)));

template <class Scalar>
void dequantise_bytes(const int8_t* codes, float scale, Scalar* out, int64_t count) {
  int64_t i = 0;
  for (; i + L <= count; i += L)
    store(out + i, __builtin_convertvector(__builtin_convertvector(load_raw<Bytes>(codes + i), IntVec), Vec) * scale);
  float rest[L] = {};
  for (int64_t j = i; j < count; ++j) rest[j - i] = codes[j];
  if (i < count) store_some(out + i, load(rest) * scale, count - i);
}

template <class Scalar>
void dequantise_halves(const uint8_t* codes, const float* levels, float scale, Scalar* out, int64_t count) {
  // A block has only sixteen values: each is rounded once, and looked up.
  Scalar values[16];
  for (int i = 0; i < 16; i += L) store(values + i, load(levels + i) * scale);
  for (int64_t i = 0; i < count / 2; ++i) {
    out[2 * i] = values[codes[i] >> 4];
    out[2 * i + 1] = values[codes[i] & 15];
  }
}

template <class Scalar>
void dequantise_of(const Dequantise& p, int num_threads) {
  for_rows(p.num_blocks, num_threads, [&p](int64_t index) {
    const int64_t first = index * p.block;
    Scalar* out = static_cast<Scalar*>(p.out) + first;
    if (p.levels)
      dequantise_halves(static_cast<const uint8_t*>(p.codes) + first / 2, p.levels, p.scales[index], out, p.block);
    else
      dequantise_bytes(static_cast<const int8_t*>(p.codes) + first, p.scales[index], out, p.block);
  });
}

}  // namespace
}  // namespace luthier::detail
