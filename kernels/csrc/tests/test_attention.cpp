// Attention against loops in double precision; the gradient against differences of the loss that the loops give.
#include "luthier/attention.hpp"

#include "oracle.hpp"

namespace {

struct Shape {
  std::vector<int64_t> bounds;
  int64_t heads, key_heads, size, window;
  float softcap;
};

struct Doubles {
  std::vector<double> query, key, value;
};

template <class Scalar>
std::vector<double> doubles(const std::vector<Scalar>& values) {
  std::vector<double> out;
  for (Scalar value : values) out.push_back(widen(value));
  return out;
}

// Output [tokens][heads][size].
std::vector<double> attend(const Shape& s, const Doubles& in, double scale) {
  std::vector<double> out(s.bounds.back() * s.heads * s.size);
  for (size_t b = 0; b + 1 < s.bounds.size(); ++b)
    for (int64_t i = s.bounds[b]; i < s.bounds[b + 1]; ++i)
      for (int64_t h = 0; h < s.heads; ++h) {
        const int64_t g = h / (s.heads / s.key_heads);
        std::vector<double> weights;
        int64_t first = s.bounds[b];
        if (s.window && i - s.window + 1 > first) first = i - s.window + 1;
        double total = 0;
        for (int64_t j = first; j <= i; ++j) {
          double score = 0;
          for (int64_t d = 0; d < s.size; ++d)
            score += in.query[(i * s.heads + h) * s.size + d] * in.key[(j * s.key_heads + g) * s.size + d];
          score *= scale;
          if (s.softcap > 0) score = s.softcap * std::tanh(score / s.softcap);
          weights.push_back(std::exp(score));
          total += weights.back();
        }
        for (int64_t j = first; j <= i; ++j)
          for (int64_t d = 0; d < s.size; ++d)
            out[(i * s.heads + h) * s.size + d] +=
                weights[j - first] / total * in.value[(j * s.key_heads + g) * s.size + d];
      }
  return out;
}

double loss(const Shape& s, const Doubles& in, double scale, const std::vector<double>& weight) {
  const auto out = attend(s, in, scale);
  double total = 0;
  for (size_t i = 0; i < out.size(); ++i) total += out[i] * weight[i];
  return total;
}

template <class Scalar>
void check(const Shape& s, luthier::Isa isa, int threads) {
  std::mt19937 random(11);
  const int64_t tokens = s.bounds.back(), wide = s.heads * s.size, narrow_row = s.key_heads * s.size;
  auto query = random_values<Scalar>(tokens * wide, 0.7f, random);
  auto key = random_values<Scalar>(tokens * narrow_row, 0.7f, random);
  auto value = random_values<Scalar>(tokens * narrow_row, 0.7f, random);
  auto weight = random_values<Scalar>(tokens * wide, 0.7f, random);
  std::vector<Scalar> out(tokens * wide), dq(tokens * wide), dk(tokens * narrow_row), dv(tokens * narrow_row);
  std::vector<float> statistics(s.heads * tokens * 2);
  const float scale = 0.4f;
  const luthier::Attention forward{{query.data(), wide, s.size},
                                   {key.data(), narrow_row, s.size},
                                   {value.data(), narrow_row, s.size},
                                   {out.data(), wide, s.size},
                                   statistics.data(),
                                   s.bounds.data(),
                                   static_cast<int64_t>(s.bounds.size()) - 1,
                                   s.heads,
                                   s.key_heads,
                                   s.size,
                                   scale,
                                   s.softcap,
                                   s.window,
                                   dtype_of<Scalar>()};
  luthier::attention(forward, isa, threads);
  luthier::attention_gradient({forward,
                               {weight.data(), wide, s.size},
                               {dq.data(), wide, s.size},
                               {dk.data(), narrow_row, s.size},
                               {dv.data(), narrow_row, s.size}},
                              isa, threads);
  Doubles in{doubles(query), doubles(key), doubles(value)};
  const auto weights = doubles(weight), want = attend(s, in, scale);
  for (size_t i = 0; i < want.size(); ++i) REQUIRE(close(widen(out[i]), want[i], tolerance<Scalar>()));
  // A few elements of each gradient, by central differences.
  std::vector<double>* inputs[] = {&in.query, &in.key, &in.value};
  const std::vector<Scalar>* gradients[] = {&dq, &dk, &dv};
  for (int which = 0; which < 3; ++which)
    for (size_t i = 0; i < inputs[which]->size(); i += 1 + inputs[which]->size() / 9) {
      double& element = (*inputs[which])[i];
      const double kept = element, step = 1e-4;
      element = kept + step;
      const double above = loss(s, in, scale, weights);
      element = kept - step;
      const double below = loss(s, in, scale, weights);
      element = kept;
      REQUIRE(close(widen((*gradients[which])[i]), (above - below) / (2 * step), tolerance<Scalar>()));
    }
}

}  // namespace

int check_attention(luthier::Isa isa, int threads) {
  const Shape shapes[] = {{{0, 1}, 1, 1, 1, 0, 0},
                          {{0, 5, 5, 70}, 4, 2, 17, 0, 0},
                          {{0, 90}, 2, 2, 66, 20, 0},
                          {{0, 3, 51}, 2, 1, 8, 0, 2.0f},
                          {{0, 0}, 1, 1, 4, 0, 0}};
  for (const Shape& shape : shapes) {
    check<float>(shape, isa, threads);
    check<uint16_t>(shape, isa, threads);
  }
  return 10;
}
