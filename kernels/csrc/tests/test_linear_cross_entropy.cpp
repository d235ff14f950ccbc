// Loss, entropy and their gradients against loops in double precision, on shapes that end inside a tile.
#include "luthier/linear_cross_entropy.hpp"

#include "oracle.hpp"

namespace {

struct Shape {
  int64_t rows, dim, vocab;
  float scale, softcap, smoothing, z_loss;
};

// Gradient of a row's outputs to its scores, and the outputs.
struct Row {
  double loss, entropy;
  std::vector<double> loss_slopes, entropy_slopes;
};

Row differentiate(const Shape& s, std::vector<double> scores, int64_t target) {
  std::vector<double> slopes(s.vocab, 1.0);
  for (int64_t v = 0; v < s.vocab && s.softcap > 0; ++v) {
    const double t = std::tanh(scores[v] / s.softcap);
    scores[v] = s.softcap * t;
    slopes[v] = 1 - t * t;
  }
  double top = -INFINITY, sum = 0, mean = 0, expected = 0;
  for (double score : scores) top = std::fmax(top, score);
  for (double score : scores) sum += std::exp(score - top), mean += score / s.vocab;
  const double lse = top + std::log(sum);
  for (double score : scores) expected += std::exp(score - lse) * score;
  Row row;
  row.loss = (1 - s.smoothing) * (lse - scores[target]) + s.smoothing * (lse - mean) + s.z_loss * lse * lse;
  row.entropy = lse - expected;
  for (int64_t v = 0; v < s.vocab; ++v) {
    const double p = std::exp(scores[v] - lse);
    row.loss_slopes.push_back(
        slopes[v] * ((1 + 2 * s.z_loss * lse) * p - (v == target ? 1 - s.smoothing : 0) - s.smoothing / s.vocab));
    row.entropy_slopes.push_back(slopes[v] * -p * (scores[v] - expected));
  }
  return row;
}

template <class Scalar>
void check(const Shape& s, luthier::Isa isa, int threads) {
  std::mt19937 random(7);
  const auto hidden = random_values<Scalar>(s.rows * s.dim, 1.0f, random);
  const auto weight = random_values<Scalar>(s.vocab * s.dim, s.scale, random);
  std::vector<float> token_weight(s.rows);
  for (float& one : token_weight) one = 0.5f + random() % 3;
  std::vector<int64_t> target(s.rows), chosen;
  for (int64_t row = 0; row < s.rows; ++row) {
    target[row] = row == 0 ? s.vocab - 1 : static_cast<int64_t>(random() % s.vocab);
    if (row % 3 != 1) chosen.push_back(row);
  }
  const int64_t count = static_cast<int64_t>(chosen.size());
  const bool with_entropy = s.smoothing == 0;
  std::vector<float> loss(count), gradient(count * s.dim), entropy(count), entropy_gradient(count * s.dim);
  luthier::linear_cross_entropy(
      {hidden.data(), weight.data(), target.data(), token_weight.data(), chosen.data(), loss.data(), gradient.data(),
       with_entropy ? entropy.data() : nullptr, with_entropy ? entropy_gradient.data() : nullptr, count, s.dim, s.vocab,
       s.dim, s.dim, s.softcap, s.smoothing, s.z_loss, dtype_of<Scalar>()},
      isa, threads);
  for (int64_t i = 0; i < count; ++i) {
    std::vector<double> scores(s.vocab);
    for (int64_t v = 0; v < s.vocab; ++v)
      for (int64_t k = 0; k < s.dim; ++k)
        scores[v] += static_cast<double>(widen(hidden[chosen[i] * s.dim + k])) * widen(weight[v * s.dim + k]);
    const Row row = differentiate(s, scores, target[chosen[i]]);
    const double w = token_weight[chosen[i]];
    REQUIRE(close(loss[i], w * row.loss, tolerance<Scalar>()));
    if (with_entropy) REQUIRE(close(entropy[i], row.entropy, tolerance<Scalar>()));
    for (int64_t k = 0; k < s.dim; ++k) {
      double slope = 0, entropy_slope = 0;
      for (int64_t v = 0; v < s.vocab; ++v) {
        slope += w * row.loss_slopes[v] * widen(weight[v * s.dim + k]);
        entropy_slope += row.entropy_slopes[v] * widen(weight[v * s.dim + k]);
      }
      REQUIRE(std::fabs(gradient[i * s.dim + k] - slope) <= tolerance<Scalar>() * (s.scale * w + std::fabs(slope)));
      if (with_entropy)
        REQUIRE(std::fabs(entropy_gradient[i * s.dim + k] - entropy_slope) <=
                tolerance<Scalar>() * (s.scale + std::fabs(entropy_slope)));
    }
  }
}

}  // namespace

int check_linear_cross_entropy(luthier::Isa isa, int threads) {
  const Shape shapes[] = {{1, 1, 1, 1.0f, 0, 0, 0},        {7, 33, 777, 1.0f, 0, 0, 0},
                          {7, 64, 256, 5.0f, 0, 0, 0},     {129, 16, 257, 1.0f, 0, 0.1f, 0.01f},
                          {20, 8, 16500, 0.1f, 0, 0, 0},   {0, 8, 16, 1.0f, 0, 0, 0},
                          {65, 2, 3, 1.0f, 2.0f, 0.2f, 0}, {9, 5, 300, 1.0f, 3.0f, 0, 0.01f}};
  for (const Shape& shape : shapes) {
    check<float>(shape, isa, threads);
    check<uint16_t>(shape, isa, threads);
  }
  return 16;
}
