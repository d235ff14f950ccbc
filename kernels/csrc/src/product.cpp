#include "luthier/product.hpp"

#include "kernels.hpp"

namespace luthier {

void product(const Product& problem, Isa isa, int num_threads) {
  detail::kernels_of(isa).product[int(problem.dtype)](problem, num_threads);
}

void gram(const Gram* problems, int num_problems, Isa isa, int num_threads) {
  if (num_problems > 0) detail::kernels_of(isa).gram[int(problems->dtype)](problems, num_problems, num_threads);
}

}  // namespace luthier
