// Operators whose rows are independent of each other: norms, rotary positions, gated activations, dropout.
#pragma once
#include "luthier/elementwise.hpp"
#include "vector.inl"

namespace luthier::detail {
namespace {

template <class Scalar>
void rms_norm_row(const RmsNorm& p, int64_t row) {
  const Scalar* x = static_cast<const Scalar*>(p.x) + row * p.x_stride;
  const Scalar* weight = static_cast<const Scalar*>(p.weight);
  Scalar* out = static_cast<Scalar*>(p.out) + row * p.out_stride;
  Vec squares = {};
  for (int64_t i = 0; i < p.dim; i += L) {
    const Vec value = load_some(x + i, p.dim - i);
    squares += value * value;
  }
  const float mean = sum_lanes(squares) / static_cast<float>(p.dim) + p.epsilon;
  // Squares that overflow would make a row of zeros, and a training that has exploded look well.
  const float inverse = mean < __builtin_inff() ? 1.0f / __builtin_sqrtf(mean) : __builtin_nanf("");
  p.inverse[row] = inverse;
  for (int64_t i = 0; i < p.dim; i += L) {
    const int64_t rest = p.dim - i;
    store_some(out + i, load_some(x + i, rest) * inverse * (load_some(weight + i, rest) + p.offset), rest);
  }
}

// With n = x * inverse and d = grad_out * (weight + offset): grad_x = inverse * (d - n * mean(d * n)).
template <class Scalar>
void rms_norm_gradient_row(const RmsNorm& p, const void* grad_out, int64_t grad_stride, int64_t row) {
  const Scalar* x = static_cast<const Scalar*>(p.x) + row * p.x_stride;
  const Scalar* grad = static_cast<const Scalar*>(grad_out) + row * grad_stride;
  const Scalar* weight = static_cast<const Scalar*>(p.weight);
  Scalar* out = static_cast<Scalar*>(p.out) + row * p.out_stride;
  const float inverse = p.inverse[row];
  Vec products = {};
  for (int64_t i = 0; i < p.dim; i += L) {
    const int64_t rest = p.dim - i;
    products += load_some(grad + i, rest) * (load_some(weight + i, rest) + p.offset) * load_some(x + i, rest);
  }
  const float shared = sum_lanes(products) * inverse * inverse / static_cast<float>(p.dim);
  for (int64_t i = 0; i < p.dim; i += L) {
    const int64_t rest = p.dim - i;
    const Vec d = load_some(grad + i, rest) * (load_some(weight + i, rest) + p.offset);
    store_some(out + i, (d - load_some(x + i, rest) * shared) * inverse, rest);
  }
}

template <class Scalar>
void rope_head(const Rope& p, int64_t token, int64_t head) {
  const Scalar* x = static_cast<const Scalar*>(p.x.elements) + token * p.x.token_stride + head * p.x.head_stride;
  Scalar* out = static_cast<Scalar*>(p.out.elements) + token * p.out.token_stride + head * p.out.head_stride;
  const Scalar* cos = static_cast<const Scalar*>(p.cos) + token * p.rotary_dim;
  const Scalar* sin = static_cast<const Scalar*>(p.sin) + token * p.rotary_dim;
  const int64_t half = p.rotary_dim / 2;
  for (int64_t i = 0; i < half; i += L) {
    const int64_t rest = half - i;
    const Vec low = load_some(x + i, rest), high = load_some(x + half + i, rest);
    const Vec low_sin = load_some(sin + i, rest), high_sin = load_some(sin + half + i, rest);
    const Vec low_turn = p.transposed ? high * high_sin : -high * low_sin;
    const Vec high_turn = p.transposed ? -low * low_sin : low * high_sin;
    store_some(out + i, low * load_some(cos + i, rest) + low_turn, rest);
    store_some(out + half + i, high * load_some(cos + half + i, rest) + high_turn, rest);
  }
  for (int64_t i = p.rotary_dim; i < p.head_dim; ++i) out[i] = x[i];
}

// The activation and its derivative.
struct Slope {
  Vec value, derivative;
};

Slope activate(Vec x, Activation activation) {
  if (activation == Activation::silu) {
    const Vec s = sigmoid_of(x);
    return {x * s, s * (1.0f + x * (1.0f - s))};
  }
  constexpr float kRoot = 0.797884560802865f, kCubic = 0.044715f;  // sqrt(2 / pi); Hendrycks, arXiv:1606.08415
  const Vec t = tanh_of((x + x * x * x * kCubic) * kRoot), inner = (1.0f + x * x * (3 * kCubic)) * kRoot;
  return {x * (1.0f + t) * 0.5f, (1.0f + t) * 0.5f + x * (1.0f - t * t) * inner * 0.5f};
}

template <class Scalar>
void gated_row(const Gated& p, int64_t row) {
  const Scalar* gate = static_cast<const Scalar*>(p.gate) + row * p.gate_stride;
  const Scalar* up = static_cast<const Scalar*>(p.up) + row * p.up_stride;
  const Scalar* grad = static_cast<const Scalar*>(p.grad_out) + row * p.grad_stride;
  const int64_t start = row * p.dim;
  for (int64_t i = 0; i < p.dim; i += L) {
    const int64_t rest = p.dim - i;
    const Slope slope = activate(load_some(gate + i, rest), p.activation);
    const Vec other = load_some(up + i, rest);
    if (!p.grad_out) {
      store_some(static_cast<Scalar*>(p.out) + start + i, slope.value * other, rest);
      continue;
    }
    const Vec change = load_some(grad + i, rest);
    store_some(static_cast<Scalar*>(p.grad_gate) + start + i, change * other * slope.derivative, rest);
    store_some(static_cast<Scalar*>(p.grad_up) + start + i, change * slope.value, rest);
  }
}

// Philox4x32-10: counter in, random words out.
void philox(uint32_t (&c)[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ key0, static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ c[3] ^ key1, static_cast<uint32_t>(a)};
    for (int i = 0; i < 4; ++i) c[i] = next[i];
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

template <class Scalar>
void dropout_row(const Dropout& p, int64_t row) {
  const Scalar* x = static_cast<const Scalar*>(p.x) + row * p.x_stride;
  Scalar* out = static_cast<Scalar*>(p.out) + row * p.out_stride;
  const double edge = p.probability * 4294967296.0;
  const uint32_t bound = edge >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(edge);
  const float scale = static_cast<float>(1.0 / (1.0 - p.probability));
  const uint64_t number = p.row0 + static_cast<uint64_t>(row);
  for (int64_t i = 0; i < p.dim; i += L) {
    float factor[L];
    for (int j = 0; j < L; j += 4) {
      uint32_t words[4] = {static_cast<uint32_t>((i + j) / 4), static_cast<uint32_t>(number),
                           static_cast<uint32_t>(number >> 32), static_cast<uint32_t>(p.stream)};
      philox(words, static_cast<uint32_t>(p.seed), static_cast<uint32_t>(p.seed >> 32));
      for (int k = 0; k < 4; ++k) factor[j + k] = words[k] < bound ? 0.0f : scale;
    }
    const Vec factors = load(factor);
    // Not a product: what is dropped is zero also where x is no number.
    store_some(out + i, select(factors > 0.0f, load_some(x + i, p.dim - i) * factors, Vec{}), p.dim - i);
  }
}

// Calls row(index) for all rows, in blocks.
template <class Row>
void for_rows(int64_t num_rows, int num_threads, Row row) {
  struct Block {
    int64_t num_rows;
    Row row;
  } block{num_rows, row};
  constexpr int64_t kRows = 32;
  parallel((num_rows + kRows - 1) / kRows, num_threads,
           [](void* context, int64_t index) {
             const Block& all = *static_cast<const Block*>(context);
             const int64_t end = (index + 1) * kRows < all.num_rows ? (index + 1) * kRows : all.num_rows;
             for (int64_t i = index * kRows; i < end; ++i) all.row(i);
           },
           &block);
}

template <class Scalar>
void rms_norm_of(const RmsNorm& p, int num_threads) {
  for_rows(p.num_rows, num_threads, [&p](int64_t row) { rms_norm_row<Scalar>(p, row); });
}

template <class Scalar>
void rms_norm_gradient_of(const RmsNorm& p, const void* grad_out, int64_t grad_stride, int num_threads) {
  for_rows(p.num_rows, num_threads,
           [=, &p](int64_t row) { rms_norm_gradient_row<Scalar>(p, grad_out, grad_stride, row); });
}

template <class Scalar>
void rope_of(const Rope& p, int num_threads) {
  for_rows(p.num_tokens, num_threads, [&p](int64_t token) {
    for (int64_t head = 0; head < p.num_heads; ++head) rope_head<Scalar>(p, token, head);
  });
}

template <class Scalar>
void gated_of(const Gated& p, int num_threads) {
  for_rows(p.num_rows, num_threads, [&p](int64_t row) { gated_row<Scalar>(p, row); });
}

template <class Scalar>
void dropout_of(const Dropout& p, int num_threads) {
  for_rows(p.num_rows, num_threads, [&p](int64_t row) { dropout_row<Scalar>(p, row); });
}

template <class Scalar>
void round_to_of(const Rounding* problems, int num_problems, int num_threads) {
  parallel(
      num_problems, num_threads,
      [](void* context, int64_t index) {
        const Rounding& p = static_cast<const Rounding*>(context)[index];
        for (int64_t i = 0; i < p.count; i += L)
          store_some(static_cast<Scalar*>(p.to) + i, load_some(p.from + i, p.count - i) * p.scale, p.count - i);
      },
      const_cast<Rounding*>(problems));
}

}  // namespace
}  // namespace luthier::detail
