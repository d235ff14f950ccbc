// Products with matrices of 8 and 4 bits: the very bits of products with the numbers that these stand for.
#include "luthier/dequantise.hpp"
#include "luthier/product.hpp"
#include "oracle.hpp"

namespace {

struct Shape {
  int64_t rows, columns, contracted;
};

// A matrix of `size` elements in blocks; with levels two codes a byte.
struct Quantised {
  std::vector<uint8_t> codes;
  std::vector<float> levels, scales;
  int64_t block;

  Quantised(int64_t size, int64_t block_size, bool halves, std::mt19937& random)
      : codes(halves ? size / 2 : size),
        scales(random_values<float>(size / block_size, 0.1f, random)),
        block(block_size) {
    for (auto& byte : codes) byte = static_cast<uint8_t>(random());
    if (halves) levels = random_values<float>(16, 1.0f, random);
  }
  const float* levels_or_null() const { return levels.empty() ? nullptr : levels.data(); }
};

template <class Scalar>
std::vector<Scalar> product_of(const Shape& s, const luthier::Term& term, luthier::Isa isa, int threads) {
  std::vector<Scalar> out(s.rows * s.columns);
  luthier::product({&term, 1, s.rows, s.columns, nullptr, nullptr, 0, out.data(), s.columns, dtype_of<Scalar>()}, isa,
                   threads);
  return out;
}

template <class Scalar>
void check(const Shape& s, bool transposed, bool halves, luthier::Isa isa, int threads) {
  std::mt19937 random(5);
  const int64_t size = s.columns * s.contracted, length = transposed ? s.contracted : s.columns;
  const Quantised held(size, halves ? 64 : length, halves, random);
  std::vector<Scalar> numbers(size);
  luthier::dequantise({held.codes.data(), held.levels_or_null(), held.scales.data(), numbers.data(), size / held.block,
                       held.block, dtype_of<Scalar>()},
                      isa, threads);
  const auto rows = random_values<Scalar>(s.rows * s.contracted, 1.0f, random);
  const luthier::Term plain{rows.data(), s.contracted, numbers.data(), length, s.contracted, transposed};
  luthier::Term term{rows.data(), s.contracted, nullptr, length, s.contracted, transposed};
  term.quantised = {held.codes.data(), held.levels_or_null(), held.scales.data(), held.block};
  REQUIRE(product_of<Scalar>(s, term, isa, threads) == product_of<Scalar>(s, plain, isa, threads));
}

template <class Scalar>
void check_all(luthier::Isa isa, int threads) {
  // Few rows, rows of several tiles, rows so many that panels are packed once; a contracted dimension of several parts.
  for (const Shape& s :
       {Shape{1, 64, 33}, Shape{5, 128, 97}, Shape{70, 192, 64}, Shape{300, 64, 70}, Shape{3, 32, 2306}})
    for (const bool transposed : {true, false})
      for (const bool halves : {true, false}) check<Scalar>(s, transposed, halves, isa, threads);
}

}  // namespace

int check_quantised_product(luthier::Isa isa, int threads) {
  check_all<float>(isa, threads);
  check_all<uint16_t>(isa, threads);
  return 40;
}
