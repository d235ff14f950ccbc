#define LUTHIER_PANEL 16
#define LUTHIER_LANES 8
#include "linear_cross_entropy_block.inl"

namespace luthier::detail {

const Kernel kernel_avx2 = {P, compute_block<FloatPath<float>, float>, compute_block<FloatPath<uint16_t>, uint16_t>};

}  // namespace luthier::detail
