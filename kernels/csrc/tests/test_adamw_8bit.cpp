// AdamW with moments of 8 bits against the same update in double precision, and against a search for the nearest value.
#include "luthier/adamw_8bit.hpp"

#include <algorithm>

#include "oracle.hpp"

namespace {

constexpr float kRate = 0.01f, kDecay = 0.1f, kBeta1 = 0.9f, kBeta2 = 0.999f, kEpsilon = 1e-8f;

// Rising values, the last of which is 1; between -1 and 1, or between 0 and 1.
std::vector<float> values_of(bool has_sign) {
  std::vector<float> values(256);
  for (int i = 0; i < 256; ++i) {
    const float place = has_sign ? (i - 127.0f) / 128.0f : i / 255.0f;
    values[i] = place * std::fabs(place);
  }
  return values;
}

std::vector<uint8_t> nearest_of(const std::vector<float>& values) {
  std::vector<uint8_t> nearest(65536);
  for (uint32_t half = 0; half < 65536; ++half) {
    const uint32_t bits = half << 16 | (half & 0x8000 ? 0xffff : 0);
    float least;
    std::memcpy(&least, &bits, sizeof least);
    for (int code = 0; code < 256; ++code)
      if (values[code] <= least) nearest[half] = static_cast<uint8_t>(code);
  }
  return nearest;
}

void check_moment(const std::vector<double>& wanted, const std::vector<uint8_t>& codes,
                  const std::vector<float>& scales, const std::vector<float>& values, int64_t block) {
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double scale = scales[i / block], got = values[codes[i]] * scale;
    double nearest = 1e30;
    for (float value : values) nearest = std::min(nearest, std::fabs(value * scale - wanted[i]));
    REQUIRE(std::fabs(got - wanted[i]) <= nearest + 1e-5 * scale);
  }
  for (size_t index = 0; index < scales.size(); ++index) {
    double greatest = 1e-12;
    for (int64_t i = 0; i < block; ++i) greatest = std::max(greatest, std::fabs(wanted[index * block + i]));
    REQUIRE(close(scales[index], greatest, 1e-5));
  }
}

void check_update(int64_t blocks, int64_t block, luthier::Isa isa, int threads) {
  std::mt19937 random(9);
  const int64_t count = blocks * block;
  auto weight = random_values<float>(count, 1.0f, random);
  const auto grad = random_values<float>(count, 0.1f, random);
  auto mean_scales = random_values<float>(blocks, 0.1f, random), square_scales = mean_scales;
  for (auto& scale : mean_scales) scale = std::fabs(scale);
  for (auto& scale : square_scales) scale = std::fabs(scale) * 0.1f;
  std::vector<uint8_t> mean_codes(count), square_codes(count);
  for (auto& code : mean_codes) code = static_cast<uint8_t>(random());
  for (auto& code : square_codes) code = static_cast<uint8_t>(random());
  const auto mean_values = values_of(true), square_values = values_of(false);
  const auto mean_nearest = nearest_of(mean_values), square_nearest = nearest_of(square_values);
  const double correction1 = 1 - std::pow(kBeta1, 3), correction2 = std::sqrt(1 - std::pow(kBeta2, 3));
  std::vector<double> weights(count), means(count), squares(count);
  for (int64_t i = 0; i < count; ++i) {
    const double g = grad[i], m = double(mean_values[mean_codes[i]]) * mean_scales[i / block];
    const double v = double(square_values[square_codes[i]]) * square_scales[i / block];
    means[i] = m + (g - m) * (1.0 - kBeta1);
    squares[i] = v + (g * g - v) * (1.0 - kBeta2);
    const double step = means[i] / correction1 / (std::sqrt(squares[i]) / correction2 + kEpsilon);
    weights[i] = weight[i] * (1.0 - double(kRate) * kDecay) - kRate * step;
  }
  luthier::adamw_8bit({weight.data(),
                       grad.data(),
                       {mean_codes.data(), mean_scales.data(), mean_values.data(), mean_nearest.data()},
                       {square_codes.data(), square_scales.data(), square_values.data(), square_nearest.data()},
                       blocks,
                       block,
                       kRate,
                       kDecay,
                       kBeta1,
                       kBeta2,
                       kEpsilon,
                       static_cast<float>(correction1),
                       static_cast<float>(correction2)},
                      isa, threads);
  for (int64_t i = 0; i < count; ++i) REQUIRE(close(weight[i], weights[i], 1e-3));
  check_moment(means, mean_codes, mean_scales, mean_values, block);
  check_moment(squares, square_codes, square_scales, square_values, block);
}

}  // namespace

int check_adamw_8bit(luthier::Isa isa, int threads) {
  check_update(70, 256, isa, threads);
  check_update(1, 256, isa, threads);
  check_update(0, 256, isa, threads);
  return 3;
}
