// Included once by each per-ISA file, which defines LUTHIER_KERNEL, LUTHIER_PANEL and LUTHIER_LANES. Nothing here may
// call an inline function of the standard library: the linker could keep this file's copy of it for every caller.
// Tokens lie in vector lanes: softmax needs no horizontal reduction, and rows of the head are broadcast unpacked.
#include <cstring>

#include "linear_cross_entropy_block.hpp"

namespace luthier::detail {
namespace {

constexpr int P = LUTHIER_PANEL, L = LUTHIER_LANES, S = P / L, R = 6;
typedef float Vec __attribute__((vector_size(L * 4)));
typedef int32_t IntVec __attribute__((vector_size(L * 4)));

Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

float widen(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
float widen(float x) { return x; }

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

// Float arithmetic: a "step" along the contracted dimension is one element.
struct FloatMath {
  typedef float Item;
  static constexpr int pair = 1;
  static Vec multiply_add(Vec acc, Vec b, const float* a) { return acc + b * *a; }
  static Vec load_items(const float* p) { return load(p); }
};

// c[rows][P] = (accumulate ? c : 0) + sum_k a(row, k) b[k][P]; strides of a in items.
template <class Math, int rows>
void tile(const typename Math::Item* a, int64_t row_stride, int64_t step_stride, const typename Math::Item* b,
          int64_t steps, float* c, bool accumulate) {
  Vec acc[rows][S];
  for (int r = 0; r < rows; ++r)
    for (int s = 0; s < S; ++s) acc[r][s] = accumulate ? load(c + r * P + s * L) : Vec{};
  for (int64_t k = 0; k < steps; ++k) {
    Vec bs[S];
    for (int s = 0; s < S; ++s) bs[s] = Math::load_items(b + (k * P + s * L) * Math::pair);
    for (int r = 0; r < rows; ++r)
      for (int s = 0; s < S; ++s)
        acc[r][s] = Math::multiply_add(acc[r][s], bs[s], a + r * row_stride + k * step_stride);
  }
  for (int r = 0; r < rows; ++r)
    for (int s = 0; s < S; ++s) store(c + r * P + s * L, acc[r][s]);
}

template <class Math>
void multiply(const typename Math::Item* a, int64_t row_stride, int64_t step_stride,
              const typename Math::Item* b, int64_t steps, float* c, int64_t rows, bool accumulate) {
  int64_t r = 0;
  for (; r + R <= rows; r += R)
    tile<Math, R>(a + r * row_stride, row_stride, step_stride, b, steps, c + r * P, accumulate);
  for (; r < rows; ++r)
    tile<Math, 1>(a + r * row_stride, row_stride, step_stride, b, steps, c + r * P, accumulate);
}

// Running maximum and sum of exponentials of one panel over `rows` more vocabulary rows.
void extend_softmax(const float* logits, int64_t rows, float* max, float* sum) {
  for (int s = 0; s < S; ++s) {
    const Vec old = load(max + s * L);
    Vec top = old;
    for (int64_t v = 0; v < rows; ++v) {
      const Vec z = load(logits + v * P + s * L);
      top = z > top ? z : top;
    }
    Vec total = load(sum + s * L) * exp_negative(old - top);
    for (int64_t v = 0; v < rows; ++v) total += exp_negative(load(logits + v * P + s * L) - top);
    store(max + s * L, top);
    store(sum + s * L, total);
  }
}

// logits [rows][P] -> softmax, in place. Not exp(z - lse): a large lse rounds to more than the last bit of the result.
void to_probabilities(float* logits, int64_t rows, const float* max, const float* sum) {
  for (int64_t v = 0; v < rows; ++v)
    for (int s = 0; s < S; ++s)
      store(logits + v * P + s * L, exp_negative(load(logits + v * P + s * L) - load(max + s * L)) / load(sum + s * L));
}

// The head's chunk as floats, and the chunk's dlogits as they are.
template <class Scalar>
struct FloatPath {
  typedef FloatMath Math;
  static int64_t steps(int64_t dim) { return dim; }
  static void pack_token(const Scalar* x, int64_t dim, int lane, float* out) {
    for (int64_t k = 0; k < dim; ++k) out[k * P + lane] = widen(x[k]);
  }
  static const float* chunk(const Scalar* w, int64_t stride, int64_t rows, int64_t dim, char* space) {
    float* out = reinterpret_cast<float*>(space);
    for (int64_t v = 0; v < rows; ++v)
      for (int64_t k = 0; k < dim; ++k) out[v * dim + k] = widen(w[v * stride + k]);
    return out;
  }
  static const float* forward_chunk(const Scalar* w, int64_t stride, int64_t rows, int64_t dim, char* space) {
    return chunk(w, stride, rows, dim, space);
  }
  static int64_t forward_stride(int64_t, int64_t dim) { return dim; }
  static const float* backward_chunk(const Scalar* w, int64_t stride, int64_t rows, int64_t dim, char* space) {
    return chunk(w, stride, rows, dim, space);
  }
  static const float* pack_dlogits(const float* dlogits, int64_t, char*) { return dlogits; }
};

template <class Path, class Scalar>
void compute_block(const LinearCrossEntropy& p, int64_t begin, int64_t end, const Scratch& scratch) {
  typedef typename Path::Math Math;
  typedef typename Math::Item Item;
  const int64_t panels = (end - begin + P - 1) / P, steps = Path::steps(p.dim);
  const Scalar* hidden = static_cast<const Scalar*>(p.hidden);
  const Scalar* weight = static_cast<const Scalar*>(p.weight);
  const int64_t panel_items = steps * P * Math::pair;
  Item* packed = reinterpret_cast<Item*>(scratch.hidden);
  std::memset(packed, 0, panels * panel_items * sizeof(Item));
  for (int64_t i = 0; i < end - begin; ++i)
    Path::pack_token(hidden + p.rows[begin + i] * p.hidden_stride, p.dim, i % P, packed + i / P * panel_items);
  for (int64_t i = 0; i < panels * P; ++i) scratch.max[i] = -__builtin_inff(), scratch.sum[i] = 0;

  for (int64_t v = 0; v < p.vocab; v += kVocabChunk) {
    const int64_t rows = p.vocab - v < kVocabChunk ? p.vocab - v : kVocabChunk;
    const Item* chunk =
        Path::forward_chunk(weight + v * p.weight_stride, p.weight_stride, rows, p.dim, scratch.weight);
    for (int64_t j = 0; j < panels; ++j) {
      float* logits = scratch.logits + (j * p.vocab + v) * P;
      multiply<Math>(chunk, Path::forward_stride(p.weight_stride, p.dim), Math::pair, packed + j * panel_items,
                     steps, logits, rows, false);
      extend_softmax(logits, rows, scratch.max + j * P, scratch.sum + j * P);
    }
  }
  for (int64_t i = 0; i < end - begin; ++i) {
    const int64_t target = p.target[p.rows[begin + i]];
    p.loss[begin + i] =
        scratch.max[i] - scratch.logits[(i / P * p.vocab + target) * P + i % P] + __builtin_logf(scratch.sum[i]);
  }
  if (!p.grad_hidden) return;

  std::memset(scratch.grad, 0, panels * P * p.dim * sizeof(float));
  for (int64_t v = 0; v < p.vocab; v += kVocabChunk) {
    const int64_t rows = p.vocab - v < kVocabChunk ? p.vocab - v : kVocabChunk;
    const Item* chunk =
        Path::backward_chunk(weight + v * p.weight_stride, p.weight_stride, rows, p.dim, scratch.weight);
    for (int64_t j = 0; j < panels; ++j) {
      float* dlogits = scratch.logits + (j * p.vocab + v) * P;
      to_probabilities(dlogits, rows, scratch.max + j * P, scratch.sum + j * P);
      for (int64_t i = j * P; i < end - begin && i < (j + 1) * P; ++i) {
        const int64_t target = p.target[p.rows[begin + i]] - v;
        if (target >= 0 && target < rows) dlogits[target * P + i % P] -= 1.0f;
      }
      const Item* packed_dlogits = Path::pack_dlogits(dlogits, rows, scratch.dlogits);
      multiply<Math>(chunk, Math::pair, p.dim * Math::pair, packed_dlogits, Path::steps(rows),
                     scratch.grad + j * p.dim * P, p.dim, true);
    }
  }
  for (int64_t i = 0; i < end - begin; ++i)
    for (int64_t k = 0; k < p.dim; ++k)
      p.grad_hidden[p.rows[begin + i] * p.dim + k] = scratch.grad[(i / P * p.dim + k) * P + i % P];
}

}  // namespace

}  // namespace luthier::detail
