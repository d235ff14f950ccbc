#include "luthier/product.hpp"

#include "kernels.hpp"

namespace luthier {

void product(const Product& problem, Isa isa, int num_threads) {
  detail::kernels_of(isa).product[int(problem.dtype)](problem, num_threads);
}

void gram(const Gram& problem, Isa isa, int num_threads) {
  detail::kernels_of(isa).gram[int(problem.dtype)](problem, num_threads);
}

}  // namespace luthier
