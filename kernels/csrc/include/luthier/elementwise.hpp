#pragma once

#include <cstdint>

#include "luthier/attention.hpp"
#include "luthier/cpuid.hpp"
#include "luthier/dtype.hpp"

namespace luthier {

// out = x / sqrt(mean(x^2) + epsilon) * (weight + offset), row by row; a row whose squares overflow
// float becomes NaN. Rows of x and out are `*_stride` elements apart.
struct RmsNorm {
  const void* x;
  const void* weight;  // [dim]
  void* out;
  float* inverse;  // [num_rows] out: 1 / sqrt(mean(x^2) + epsilon)
  int64_t num_rows, dim, x_stride, out_stride;
  float epsilon, offset;
  Dtype dtype;
};

void rms_norm(const RmsNorm& problem, Isa isa, int num_threads);

// grad_x from `grad_out`, whose rows are dense; `forward` as computed, its `out` being where grad_x goes.
void rms_norm_gradient(const RmsNorm& forward, const void* grad_out, int64_t grad_stride, Isa isa, int num_threads);

// Turns the first `rotary_dim` elements of every head by the angles of its token (arXiv:2104.09864, halves rotated):
//   out[i] = x[i] cos[i] - x[i + half] sin[i],   out[i + half] = x[i + half] cos[i + half] + x[i] sin[i + half].
// The other elements are copied. With `transposed` it is the gradient's map instead.
struct Rope {
  Heads x, out;
  const void* cos;  // [num_tokens][rotary_dim], dense
  const void* sin;
  int64_t num_tokens, num_heads, head_dim, rotary_dim;
  bool transposed;
  Dtype dtype;
};

void rope(const Rope& problem, Isa isa, int num_threads);

enum class Activation { silu, gelu_tanh };

// out = activation(gate) * up, over `count` elements in rows of `dim`. With grad_out: grad_gate and grad_up instead.
struct Gated {
  const void *gate, *up, *grad_out;
  void *out, *grad_gate, *grad_up;
  int64_t num_rows, dim, gate_stride, up_stride, grad_stride;  // what is written is dense
  Activation activation;
  Dtype dtype;
};

void gated(const Gated& problem, Isa isa, int num_threads);

// Inverted dropout: out[row][column] = x / (1 - probability), or 0 where the Philox4x32-10 number (Salmon et al., 2011)
// of counter (column / 4, row0 + row, stream, 0) and key `seed`, word column % 4, is below probability * 2^32.
struct Dropout {
  const void* x;
  void* out;
  int64_t num_rows, dim, x_stride, out_stride;
  uint64_t seed, row0, stream;
  double probability;
  Dtype dtype;
};

void dropout(const Dropout& problem, Isa isa, int num_threads);

// to[i] = scale * from[i], rounded to the type asked for.
struct Rounding {
  const float* from;
  void* to;
  int64_t count;
  float scale;
};

void round_to(const Rounding* problems, int num_problems, Dtype dtype, Isa isa, int num_threads);

}  // namespace luthier
