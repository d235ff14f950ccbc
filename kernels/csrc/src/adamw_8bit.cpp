#include "luthier/adamw_8bit.hpp"

#include "kernels.hpp"

namespace luthier {

void adamw_8bit(const AdamW8& problem, Isa isa, int num_threads) {
  detail::kernels_of(isa).adamw_8bit(problem, num_threads);
}

}  // namespace luthier
