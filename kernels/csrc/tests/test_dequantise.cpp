// Weights of 8 and 4 bits against the same products in double precision, in blocks of odd lengths.
#include "luthier/dequantise.hpp"

#include "oracle.hpp"

namespace {

std::vector<uint8_t> random_bytes(int64_t count, std::mt19937& random) {
  std::vector<uint8_t> bytes(count);
  for (auto& byte : bytes) byte = static_cast<uint8_t>(random());
  return bytes;
}

template <class Scalar>
void check_bytes(int64_t blocks, int64_t block, luthier::Isa isa, int threads) {
  std::mt19937 random(7);
  const auto codes = random_bytes(blocks * block, random);
  const auto scales = random_values<float>(blocks, 0.1f, random);
  std::vector<Scalar> out(blocks * block);
  luthier::dequantise({codes.data(), nullptr, scales.data(), out.data(), blocks, block, dtype_of<Scalar>()}, isa,
                      threads);
  for (int64_t i = 0; i < blocks * block; ++i) {
    Scalar want;
    narrow(static_cast<float>(static_cast<int8_t>(codes[i])) * scales[i / block], &want);
    REQUIRE(out[i] == want);
  }
}

template <class Scalar>
void check_halves(int64_t blocks, int64_t block, luthier::Isa isa, int threads) {
  std::mt19937 random(8);
  const auto codes = random_bytes(blocks * block / 2, random);
  const auto scales = random_values<float>(blocks, 0.1f, random), levels = random_values<float>(16, 1.0f, random);
  std::vector<Scalar> out(blocks * block);
  luthier::dequantise({codes.data(), levels.data(), scales.data(), out.data(), blocks, block, dtype_of<Scalar>()}, isa,
                      threads);
  for (int64_t i = 0; i < blocks * block; ++i) {
    const int code = i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4;
    Scalar want;
    narrow(levels[code] * scales[i / block], &want);
    REQUIRE(out[i] == want);
  }
}

template <class Scalar>
void check_all(luthier::Isa isa, int threads) {
  check_bytes<Scalar>(40, 37, isa, threads);
  check_bytes<Scalar>(3, 64, isa, threads);
  check_bytes<Scalar>(0, 64, isa, threads);
  check_halves<Scalar>(70, 64, isa, threads);
  check_halves<Scalar>(3, 34, isa, threads);
}

}  // namespace

int check_dequantise(luthier::Isa isa, int threads) {
  check_all<float>(isa, threads);
  check_all<uint16_t>(isa, threads);
  return 10;
}
