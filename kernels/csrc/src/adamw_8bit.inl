// AdamW whose moments have 8 bits between updates.
#pragma once
#include "elementwise.inl"
#include "luthier/adamw_8bit.hpp"

namespace luthier::detail {
namespace {

Vec root_of(Vec x) {
#if LUTHIER_LANES == 16
  return (Vec)_mm512_sqrt_ps((__m512)x);
#else
  for (int i = 0; i < L; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

Vec widened(const Moment8& moment, const uint8_t* codes, float scale) {
  float part[L];
  for (int i = 0; i < L; ++i) part[i] = moment.values[codes[i]];
  return load(part) * scale;
}

// The code of the nearest value; of two as near the upper one.
uint8_t nearest_code(const Moment8& moment, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  int code = moment.nearest[bits >> 16];
  // Values lie further apart than floats with one upper half.
  if (code < 255 && moment.values[code + 1] <= value) ++code;
  if (code < 255 && value - moment.values[code] >= (moment.values[code + 1] - moment.values[code]) * 0.5f) ++code;
  return static_cast<uint8_t>(code);
}

void keep(const Moment8& moment, int64_t block, const float* values, float greatest, int64_t count) {
  const float scale = greatest > 1e-12f ? greatest : 1e-12f;
  moment.scales[block] = scale;
  uint8_t* codes = moment.codes + block * count;
  for (int64_t i = 0; i < count; ++i) codes[i] = nearest_code(moment, values[i] / scale);
}

// `block` is a multiple of L.
void adamw_8bit_block(const AdamW8& p, int64_t index, float* means, float* squares) {
  const int64_t first = index * p.block;
  float* weight = p.weight + first;
  const float *grad = p.grad + first, mean_scale = p.mean.scales[index], square_scale = p.square.scales[index];
  Vec greatest_mean = {}, greatest_square = {};
  for (int64_t i = 0; i < p.block; i += L) {
    const Vec g = load(grad + i), w = load(weight + i);
    const Vec m = widened(p.mean, p.mean.codes + first + i, mean_scale);
    const Vec v = widened(p.square, p.square.codes + first + i, square_scale);
    const Vec mean = m + (g - m) * (1.0f - p.beta1), square = v + (g * g - v) * (1.0f - p.beta2);
    store(means + i, mean);
    store(squares + i, square);
    const Vec size = absolute(mean);
    greatest_mean = select(size > greatest_mean, size, greatest_mean);
    greatest_square = select(square > greatest_square, square, greatest_square);
    const Vec step = mean / p.correction1 / (root_of(square) / p.correction2 + p.epsilon);
    store(weight + i, w - w * (p.learning_rate * p.decay) - step * p.learning_rate);
  }
  keep(p.mean, index, means, max_lanes(greatest_mean), p.block);
  keep(p.square, index, squares, max_lanes(greatest_square), p.block);
}

void adamw_8bit_of(const AdamW8& p, int num_threads) {
  for_rows(p.num_blocks, num_threads, [&p](int64_t index) {
    float* kept = reinterpret_cast<float*>(scratch(2 * p.block * static_cast<int64_t>(sizeof(float))));
    adamw_8bit_block(p, index, kept, kept + p.block);
  });
}

}  // namespace
}  // namespace luthier::detail
