// Weights of 8 or 4 bits made into floats or bfloat16.
#pragma once
#include "elementwise.inl"
#include "luthier/dequantise.hpp"
#include "luthier/product.hpp"

namespace luthier::detail {
namespace {

typedef int8_t Bytes __attribute__((vector_size(L)));

// gcc 12 takes bytes apart one by one to widen them.
Vec widened(const int8_t* codes) {
#if LUTHIER_LANES == 16
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
#else
  return __builtin_convertvector(__builtin_convertvector(load_raw<Bytes>(codes), IntVec), Vec);
#endif
}

template <class Scalar>
void dequantise_bytes(const int8_t* codes, float scale, Scalar* out, int64_t count) {
  int64_t i = 0;
  for (; i + L <= count; i += L) store(out + i, widened(codes + i) * scale);
  float rest[L] = {};
  for (int64_t j = i; j < count; ++j) rest[j - i] = codes[j];
  if (i < count) store_some(out + i, load(rest) * scale, count - i);
}

// Looks up the values of pairs of codes; returns of how many codes, from the first on.
template <class Scalar>
int64_t look_up_vectors(const uint8_t*, const Scalar*, Scalar*, int64_t) {
  return 0;
}

#if LUTHIER_LANES == 16
int64_t look_up_vectors(const uint8_t* codes, const uint16_t* values, uint16_t* out, int64_t count) {
  const __m512i table = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
  const __m128i nibble = _mm_set1_epi8(15);
  int64_t i = 0;
  for (; i + 2 * L <= count; i += 2 * L) {
    const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2));
    const __m128i upper = _mm_and_si128(_mm_srli_epi16(pairs, 4), nibble), lower = _mm_and_si128(pairs, nibble);
    const __m256i in_order = _mm256_set_m128i(_mm_unpackhi_epi8(upper, lower), _mm_unpacklo_epi8(upper, lower));
    _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(in_order), table));
  }
  return i;
}
#endif

// Codes [first, first + count) of a block.
template <class Scalar>
void dequantise_halves(const uint8_t* codes, const float* levels, float scale, int64_t first, Scalar* out,
                       int64_t count) {
  // A block has only sixteen values: each is rounded once, and looked up.
  Scalar values[16];
  for (int i = 0; i < 16; i += L) store(values + i, load(levels + i) * scale);
  if (first % 2 != 0 && count > 0) {
    *out++ = values[codes[first / 2] & 15];
    ++first;
    --count;
  }
  codes += first / 2;
  for (int64_t i = look_up_vectors(codes, values, out, count) / 2; i < count / 2; ++i) {
    out[2 * i] = values[codes[i] >> 4];
    out[2 * i + 1] = values[codes[i] & 15];
  }
  if (count % 2 != 0) out[count - 1] = values[codes[count / 2] >> 4];
}

// Elements [at, at + count) of a block, of which `index` is the number.
template <class Scalar>
void dequantise_some(const Codes& m, int64_t index, int64_t at, int64_t count, Scalar* out) {
  const int64_t first = index * m.block;
  if (m.levels)
    dequantise_halves(static_cast<const uint8_t*>(m.codes) + first / 2, m.levels, m.scales[index], at, out, count);
  else
    dequantise_bytes(static_cast<const int8_t*>(m.codes) + first + at, m.scales[index], out, count);
}

// Elements [row, row + rows) x [column, column + columns) of a matrix whose rows are `length` long, dense.
template <class Scalar>
void dequantise_part(const Codes& m, int64_t length, int64_t row, int64_t rows, int64_t column, int64_t columns,
                     Scalar* out) {
  for (int64_t r = row; r < row + rows; ++r) {
    int64_t index = (r * length + column) / m.block, at = (r * length + column) % m.block;
    for (int64_t left = columns; left > 0; ++index, at = 0) {
      const int64_t count = m.block - at < left ? m.block - at : left;
      dequantise_some(m, index, at, count, out);
      out += count;
      left -= count;
    }
  }
}

template <class Scalar>
void dequantise_of(const Dequantise& p, int num_threads) {
  const Codes codes{p.codes, p.levels, p.scales, p.block};
  for_rows(p.num_blocks, num_threads, [&p, &codes](int64_t index) {
    dequantise_some(codes, index, 0, p.block, static_cast<Scalar*>(p.out) + index * p.block);
  });
}

}  // namespace
}  // namespace luthier::detail
