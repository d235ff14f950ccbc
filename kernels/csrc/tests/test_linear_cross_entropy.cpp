// Checks every instruction set of this machine against a double-precision loop, on shapes that end inside a tile.
// Built with the sanitizers by sanitised.sh: every array is exactly as large as it must be, so that an access
// beyond its end is found.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "luthier/linear_cross_entropy.hpp"

namespace {

using luthier::Dtype;
using luthier::Isa;

void require(bool holds, const char* what, int line) {
  if (holds) return;
  std::fprintf(stderr, "line %d: %s\n", line, what);
  std::exit(1);
}
#define REQUIRE(condition) require(condition, #condition, __LINE__)

float widen(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float out;
  std::memcpy(&out, &wide, sizeof out);
  return out;
}
float widen(float value) { return value; }

void narrow(float value, float* out) { *out = value; }
void narrow(float value, uint16_t* out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  *out = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class Scalar>
std::vector<Scalar> random_values(int64_t count, float scale, std::mt19937& random) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<Scalar> values(count);
  for (auto& value : values) narrow(normal(random), &value);
  return values;
}

struct Shape {
  int64_t rows, dim, vocab;
  float scale;
};

template <class Scalar>
void check(const Shape& shape, Isa isa, Dtype dtype, int threads) {
  std::mt19937 random(7);
  const auto hidden = random_values<Scalar>(shape.rows * shape.dim, 1.0f, random);
  const auto weight = random_values<Scalar>(shape.vocab * shape.dim, shape.scale, random);
  std::vector<int64_t> target(shape.rows), chosen;
  for (int64_t row = 0; row < shape.rows; ++row) {
    target[row] = row == 0 ? shape.vocab - 1 : static_cast<int64_t>(random() % shape.vocab);
    if (row % 3 != 1) chosen.push_back(row);
  }
  const int64_t count = static_cast<int64_t>(chosen.size());
  std::vector<float> loss(count), gradient(shape.rows * shape.dim, -1.0f);
  luthier::linear_cross_entropy({hidden.data(), weight.data(), target.data(), chosen.data(), loss.data(),
                                 gradient.data(), count, shape.dim, shape.vocab, shape.dim, shape.dim, dtype},
                                isa, threads);
  const double tolerance = dtype == Dtype::bfloat16 ? 2e-2 : 2e-4;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = chosen[i];
    std::vector<double> logits(shape.vocab);
    double top = -INFINITY, sum = 0;
    for (int64_t v = 0; v < shape.vocab; ++v) {
      for (int64_t k = 0; k < shape.dim; ++k)
        logits[v] += static_cast<double>(widen(hidden[row * shape.dim + k])) * widen(weight[v * shape.dim + k]);
      top = std::fmax(top, logits[v]);
    }
    for (double logit : logits) sum += std::exp(logit - top);
    const double expected = top + std::log(sum) - logits[target[row]];
    REQUIRE(std::fabs(loss[i] - expected) <= tolerance * (1 + std::fabs(expected)));
    for (int64_t k = 0; k < shape.dim; ++k) {
      double slope = -static_cast<double>(widen(weight[target[row] * shape.dim + k]));
      for (int64_t v = 0; v < shape.vocab; ++v)
        slope += std::exp(logits[v] - top) / sum * widen(weight[v * shape.dim + k]);
      REQUIRE(std::fabs(gradient[row * shape.dim + k] - slope) <= tolerance * (shape.scale + std::fabs(slope)));
    }
  }
  for (int64_t row = 1; row < shape.rows; row += 3)
    for (int64_t k = 0; k < shape.dim; ++k) REQUIRE(gradient[row * shape.dim + k] == -1.0f);
}

}  // namespace

int main() {
  const Shape shapes[] = {{1, 1, 1, 1.0f},      {7, 33, 777, 1.0f}, {7, 64, 256, 5.0f}, {129, 16, 257, 1.0f},
                          {200, 8, 1000, 0.1f}, {0, 8, 16, 1.0f},   {65, 2, 3, 1.0f}};
  const Isa isas[] = {Isa::plain, Isa::avx2, Isa::avx512_bf16};
  int num_checked = 0;
  for (Isa isa : isas) {
    if (!luthier::supports(isa)) continue;
    for (const Shape& shape : shapes) {
      for (int threads : {1, 3}) {
        check<float>(shape, isa, Dtype::float32, threads);
        check<uint16_t>(shape, isa, Dtype::bfloat16, threads);
        num_checked += 2;
      }
    }
  }
  bool refused = false;
  try {
    luthier::linear_cross_entropy({}, Isa::plain, 0);
  } catch (const std::exception&) {
    refused = true;
  }
  REQUIRE(refused);
  std::printf("%d passed, 0 failed\n", num_checked);
}
