// Matrix products against loops in double precision, on shapes that end inside a tile.
#include "luthier/product.hpp"

#include "oracle.hpp"

namespace {

struct Shape {
  int64_t rows, columns, contracted, rank;
};

template <class Scalar>
void check(const Shape& s, luthier::Isa isa, int threads) {
  std::mt19937 random(3);
  const auto x = random_values<Scalar>(s.rows * s.contracted, 1.0f, random);
  const auto w = random_values<Scalar>(s.columns * s.contracted, 0.3f, random);
  const auto low = random_values<Scalar>(s.rows * s.rank, 1.0f, random);
  const auto up = random_values<Scalar>(s.rank * s.columns, 0.3f, random);
  const auto bias = random_values<Scalar>(s.columns, 1.0f, random);
  const auto addend = random_values<Scalar>(s.rows * s.columns, 1.0f, random);
  std::vector<Scalar> out(s.rows * s.columns);
  const luthier::Term terms[] = {{x.data(), s.contracted, w.data(), s.contracted, s.contracted, true},
                                 {low.data(), s.rank, up.data(), s.columns, s.rank, false}};
  luthier::product(
      {terms, 2, s.rows, s.columns, bias.data(), addend.data(), s.columns, out.data(), s.columns, dtype_of<Scalar>()},
      isa, threads);
  for (int64_t r = 0; r < s.rows; ++r)
    for (int64_t c = 0; c < s.columns; ++c) {
      double want = widen(bias[c]) + widen(addend[r * s.columns + c]);
      for (int64_t k = 0; k < s.contracted; ++k)
        want += static_cast<double>(widen(x[r * s.contracted + k])) * widen(w[c * s.contracted + k]);
      for (int64_t k = 0; k < s.rank; ++k)
        want += static_cast<double>(widen(low[r * s.rank + k])) * widen(up[k * s.columns + c]);
      REQUIRE(close(widen(out[r * s.columns + c]), want, tolerance<Scalar>()));
    }
  // A few columns alone: the bits of an element do not depend on how wide the result is.
  const int64_t few = std::min<int64_t>(s.columns, 3);
  std::vector<Scalar> narrow(s.rows * few);
  luthier::product(
      {terms, 2, s.rows, few, bias.data(), addend.data(), s.columns, narrow.data(), few, dtype_of<Scalar>()}, isa,
      threads);
  for (int64_t r = 0; r < s.rows; ++r)
    for (int64_t c = 0; c < few; ++c) REQUIRE(narrow[r * few + c] == out[r * s.columns + c]);
  std::vector<float> unrounded(s.rows * s.columns);
  luthier::product({terms, 2, s.rows, s.columns, bias.data(), addend.data(), s.columns, unrounded.data(), s.columns,
                    dtype_of<Scalar>(), true},
                   isa, threads);
  for (int64_t i = 0; i < s.rows * s.columns; ++i) REQUIRE(close(unrounded[i], widen(out[i]), tolerance<Scalar>()));
  std::vector<float> gram(s.rank * s.contracted), other(s.contracted * s.rank), transposed(s.contracted * s.rank);
  const luthier::Gram grams[] = {{low.data(), s.rank, x.data(), s.contracted, s.rows, s.rank, s.contracted, 0.5f,
                                  gram.data(), false, dtype_of<Scalar>()},
                                 {x.data(), s.contracted, low.data(), s.rank, s.rows, s.contracted, s.rank, 1.0f,
                                  other.data(), false, dtype_of<Scalar>()},
                                 {low.data(), s.rank, x.data(), s.contracted, s.rows, s.rank, s.contracted, 0.5f,
                                  transposed.data(), true, dtype_of<Scalar>()}};
  luthier::gram(grams, 3, isa, threads);
  for (int64_t r = 0; r < s.rank; ++r)
    for (int64_t c = 0; c < s.contracted; ++c) {
      double want = 0;
      for (int64_t row = 0; row < s.rows; ++row)
        want += 0.5 * widen(low[row * s.rank + r]) * widen(x[row * s.contracted + c]);
      REQUIRE(close(gram[r * s.contracted + c], want, tolerance<Scalar>()));
      REQUIRE(close(other[c * s.rank + r], 2 * want, tolerance<Scalar>()));
      REQUIRE(transposed[c * s.rank + r] == gram[r * s.contracted + c]);
    }
}

constexpr int64_t kNoBase = -1;

// Terms of some rows and columns alone: row r takes the matrix of segment r / 5, which has r / 5 + 1 columns. Before
// them a term of all rows that contracts `base` elements, which may be none; no such term where `base` is kNoBase.
template <class Scalar>
void check_parts(const Shape& s, int64_t base, luthier::Isa isa, int threads) {
  std::mt19937 random(4);
  const auto x = random_values<Scalar>(s.rows * s.contracted, 1.0f, random);
  const auto w = random_values<Scalar>(s.columns * s.contracted, 0.3f, random);
  const auto low = random_values<Scalar>(s.rows * std::max(base, int64_t{0}), 1.0f, random);
  const auto up = random_values<Scalar>(std::max(base, int64_t{0}) * s.columns, 0.3f, random);
  std::vector<Scalar> out(s.rows * s.columns);
  std::vector<luthier::Term> terms;
  if (base != kNoBase) terms.push_back({low.data(), base, up.data(), s.columns, base, false});
  for (int64_t first = 0; first < s.rows; first += 5)
    terms.push_back({x.data(), s.contracted, w.data(), s.contracted, s.contracted, true, first, first + 5,
                     std::min(first / 5 + 1, s.columns)});
  luthier::product({terms.data(), static_cast<int>(terms.size()), s.rows, s.columns, nullptr, nullptr, 0, out.data(),
                    s.columns, dtype_of<Scalar>()},
                   isa, threads);
  for (int64_t r = 0; r < s.rows; ++r)
    for (int64_t c = 0; c < s.columns; ++c) {
      double want = 0;
      for (int64_t k = 0; k < base; ++k)
        want += static_cast<double>(widen(low[r * base + k])) * widen(up[k * s.columns + c]);
      for (int64_t k = 0; k < s.contracted && c <= r / 5; ++k)
        want += static_cast<double>(widen(x[r * s.contracted + k])) * widen(w[c * s.contracted + k]);
      REQUIRE(close(widen(out[r * s.columns + c]), want, tolerance<Scalar>()));
    }
}

}  // namespace

int check_product(luthier::Isa isa, int threads) {
  const Shape shapes[] = {{1, 1, 1, 1},     {7, 33, 65, 5},    {0, 4, 4, 2},      {53, 130, 17, 66},
                          {3, 70, 2050, 1}, {41, 270, 300, 3}, {290, 70, 100, 33}};
  for (const Shape& shape : shapes) {
    check<float>(shape, isa, threads);
    check<uint16_t>(shape, isa, threads);
    for (const int64_t base : {kNoBase, int64_t{0}, shape.rank}) {
      check_parts<float>(shape, base, isa, threads);
      check_parts<uint16_t>(shape, base, isa, threads);
    }
  }
  return 56;
}
