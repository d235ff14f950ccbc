// Norms, rotary positions, gated activations and dropout against loops in double precision, in rows of odd lengths.
#include "luthier/elementwise.hpp"

#include "oracle.hpp"

namespace {

template <class Scalar>
void check_norm(int64_t rows, int64_t dim, luthier::Isa isa, int threads) {
  std::mt19937 random(5);
  const auto x = random_values<Scalar>(rows * dim, 1.0f, random), weight = random_values<Scalar>(dim, 1.0f, random);
  const auto grad = random_values<Scalar>(rows * dim, 1.0f, random);
  std::vector<Scalar> out(rows * dim), dx(rows * dim);
  std::vector<float> inverse(rows);
  luthier::RmsNorm problem{x.data(), weight.data(), out.data(), inverse.data(),    rows, dim, dim,
                           dim,      1e-5f,         1.0f,       dtype_of<Scalar>()};
  luthier::rms_norm(problem, isa, threads);
  problem.out = dx.data();
  luthier::rms_norm_gradient(problem, grad.data(), dim, isa, threads);
  for (int64_t r = 0; r < rows; ++r) {
    double mean = 1e-5, shared = 0;
    for (int64_t i = 0; i < dim; ++i) mean += std::pow(widen(x[r * dim + i]), 2) / dim;
    for (int64_t i = 0; i < dim; ++i)
      shared += widen(grad[r * dim + i]) * (widen(weight[i]) + 1.0) * widen(x[r * dim + i]) / dim / mean;
    for (int64_t i = 0; i < dim; ++i) {
      const double d = widen(grad[r * dim + i]) * (widen(weight[i]) + 1.0), value = widen(x[r * dim + i]);
      REQUIRE(close(widen(out[r * dim + i]), value / std::sqrt(mean) * (widen(weight[i]) + 1.0), tolerance<Scalar>()));
      REQUIRE(close(widen(dx[r * dim + i]), (d - value * shared) / std::sqrt(mean), tolerance<Scalar>()));
    }
  }
}

template <class Scalar>
void check_rope(luthier::Isa isa, int threads) {
  constexpr int64_t kTokens = 5, kHeads = 3, kSize = 23, kRotary = 14, kHalf = 7;
  std::mt19937 random(5);
  auto x = random_values<Scalar>(kTokens * kHeads * kSize, 1.0f, random);
  const auto cos = random_values<Scalar>(kTokens * kRotary, 1.0f, random);
  const auto sin = random_values<Scalar>(kTokens * kRotary, 1.0f, random);
  std::vector<Scalar> out(x.size());
  luthier::rope({{x.data(), kHeads * kSize, kSize},
                 {out.data(), kHeads * kSize, kSize},
                 cos.data(),
                 sin.data(),
                 kTokens,
                 kHeads,
                 kSize,
                 kRotary,
                 false,
                 dtype_of<Scalar>()},
                isa, threads);
  for (int64_t t = 0; t < kTokens; ++t)
    for (int64_t h = 0; h < kHeads; ++h)
      for (int64_t i = 0; i < kSize; ++i) {
        const Scalar* head = &x[(t * kHeads + h) * kSize];
        double want = widen(head[i]);
        if (i < kRotary) want *= widen(cos[t * kRotary + i]);
        if (i < kHalf) want -= widen(head[i + kHalf]) * widen(sin[t * kRotary + i]);
        if (i >= kHalf && i < kRotary) want += widen(head[i - kHalf]) * widen(sin[t * kRotary + i]);
        REQUIRE(close(widen(out[(t * kHeads + h) * kSize + i]), want, tolerance<Scalar>()));
      }
}

double activated(double x, bool gelu) {
  if (!gelu) return x / (1 + std::exp(-x));
  return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
}

template <class Scalar>
void check_gated(int64_t rows, int64_t dim, bool gelu, luthier::Isa isa, int threads) {
  std::mt19937 random(5);
  const auto gate = random_values<Scalar>(rows * dim, 2.0f, random),
             up = random_values<Scalar>(rows * dim, 1.0f, random);
  const auto grad = random_values<Scalar>(rows * dim, 1.0f, random);
  std::vector<Scalar> out(rows * dim), grad_gate(rows * dim), grad_up(rows * dim);
  luthier::Gated problem{gate.data(),
                         up.data(),
                         nullptr,
                         out.data(),
                         nullptr,
                         nullptr,
                         rows,
                         dim,
                         dim,
                         dim,
                         0,
                         gelu ? luthier::Activation::gelu_tanh : luthier::Activation::silu,
                         dtype_of<Scalar>()};
  luthier::gated(problem, isa, threads);
  problem.grad_out = grad.data();
  problem.grad_stride = dim;
  problem.grad_gate = grad_gate.data();
  problem.grad_up = grad_up.data();
  luthier::gated(problem, isa, threads);
  for (int64_t i = 0; i < rows * dim; ++i) {
    const double x = widen(gate[i]), slope = (activated(x + 1e-5, gelu) - activated(x - 1e-5, gelu)) / 2e-5;
    REQUIRE(close(widen(out[i]), activated(x, gelu) * widen(up[i]), tolerance<Scalar>()));
    REQUIRE(close(widen(grad_gate[i]), widen(grad[i]) * widen(up[i]) * slope, tolerance<Scalar>()));
    REQUIRE(close(widen(grad_up[i]), widen(grad[i]) * activated(x, gelu), tolerance<Scalar>()));
  }
}

template <class Scalar>
void check_dropout(luthier::Isa isa, int threads) {
  constexpr int64_t kRows = 40, kDim = 37;
  std::mt19937 random(5);
  const auto x = random_values<Scalar>(kRows * kDim, 1.0f, random);
  std::vector<Scalar> out(x.size());
  luthier::dropout({x.data(), out.data(), kRows, kDim, kDim, kDim, 77, 3, 1, 0.25, dtype_of<Scalar>()}, isa, threads);
  int64_t dropped = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    if (widen(out[i]) == 0)
      ++dropped;
    else
      REQUIRE(close(widen(out[i]), widen(x[i]) / 0.75, tolerance<Scalar>()));
  }
  REQUIRE(dropped > 300 && dropped < 450);
}

template <class Scalar>
void check_rounding(luthier::Isa isa, int threads) {
  std::mt19937 random(6);
  const auto x = random_values<float>(70, 1.0f, random);
  std::vector<Scalar> first(33), second(37);
  const luthier::Rounding problems[] = {{x.data(), first.data(), 33, 2.0f}, {x.data() + 33, second.data(), 37, 0.1f}};
  luthier::round_to(problems, 2, dtype_of<Scalar>(), isa, threads);
  for (int i = 0; i < 70; ++i)
    REQUIRE(close(widen(i < 33 ? first[i] : second[i - 33]), x[i] * (i < 33 ? 2.0 : 0.1), tolerance<Scalar>()));
}

template <class Scalar>
void check_all(luthier::Isa isa, int threads) {
  check_norm<Scalar>(7, 33, isa, threads);
  check_norm<Scalar>(0, 8, isa, threads);
  check_rope<Scalar>(isa, threads);
  check_gated<Scalar>(40, 21, false, isa, threads);
  check_gated<Scalar>(3, 16, true, isa, threads);
  check_dropout<Scalar>(isa, threads);
  check_rounding<Scalar>(isa, threads);
}

}  // namespace

int check_elementwise(luthier::Isa isa, int threads) {
  check_all<float>(isa, threads);
  check_all<uint16_t>(isa, threads);
  return 14;
}
