#include "luthier/elementwise.hpp"

#include "kernels.hpp"

namespace luthier {

void rms_norm(const RmsNorm& problem, Isa isa, int num_threads) {
  detail::kernels_of(isa).rms_norm[int(problem.dtype)](problem, num_threads);
}

void rms_norm_gradient(const RmsNorm& forward, const void* grad_out, int64_t grad_stride, Isa isa, int num_threads) {
  detail::kernels_of(isa).rms_norm_gradient[int(forward.dtype)](forward, grad_out, grad_stride, num_threads);
}

void rope(const Rope& problem, Isa isa, int num_threads) {
  detail::kernels_of(isa).rope[int(problem.dtype)](problem, num_threads);
}

void gated(const Gated& problem, Isa isa, int num_threads) {
  detail::kernels_of(isa).gated[int(problem.dtype)](problem, num_threads);
}

void dropout(const Dropout& problem, Isa isa, int num_threads) {
  detail::kernels_of(isa).dropout[int(problem.dtype)](problem, num_threads);
}

void round_to(const Rounding* problems, int num_problems, Dtype dtype, Isa isa, int num_threads) {
  detail::kernels_of(isa).round_to[int(dtype)](problems, num_problems, num_threads);
}

}  // namespace luthier
