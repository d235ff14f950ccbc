// Runs every check with every instruction set of this machine, with one thread and with three.
#include <exception>

#include "luthier/linear_cross_entropy.hpp"
#include "oracle.hpp"

int main() {
  const luthier::Isa isas[] = {luthier::Isa::plain, luthier::Isa::avx2, luthier::Isa::avx512, luthier::Isa::avx512_bf16,
                               luthier::Isa::amx_bf16};
  int num_checked = 0;
  for (luthier::Isa isa : isas) {
    if (!luthier::supports(isa)) continue;
    for (int threads : {1, 3})
      num_checked += check_adamw_8bit(isa, threads) + check_attention(isa, threads) +
                     check_attention_decode(isa, threads) + check_dequantise(isa, threads) +
                     check_elementwise(isa, threads) + check_linear_cross_entropy(isa, threads) +
                     check_product(isa, threads) + check_program(isa, threads) + check_quantised_product(isa, threads);
  }
  bool refused = false;
  try {
    luthier::linear_cross_entropy({}, luthier::Isa::plain, 0);
  } catch (const std::exception&) {
    refused = true;
  }
  REQUIRE(refused);
  std::printf("%d passed, 0 failed\n", num_checked);
}
