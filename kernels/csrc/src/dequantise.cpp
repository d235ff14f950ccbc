#include "luthier/dequantise.hpp"

#include "kernels.hpp"

namespace luthier {

void dequantise(const Dequantise& problem, Isa isa, int num_threads) {
  detail::kernels_of(isa).dequantise[int(problem.dtype)](problem, num_threads);
}

}  // namespace luthier
