// The only file that includes pybind11: it exposes the torch-free kernels as functions over raw pointers.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "luthier/cpuid.hpp"
#include "luthier/linear_cross_entropy.hpp"

namespace py = pybind11;

namespace {

luthier::Isa isa_of(const std::string& name) {
  if (name == "plain") return luthier::Isa::plain;
  if (name == "avx2") return luthier::Isa::avx2;
  if (name == "avx512_bf16") return luthier::Isa::avx512_bf16;
  throw std::invalid_argument("isa must be plain, avx2 or avx512_bf16, got " + name);
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "Luthier's CPU kernels.";
  module.def("supports", [](const std::string& isa) { return luthier::supports(isa_of(isa)); });
  module.def(
      "linear_cross_entropy",
      [](uintptr_t hidden, uintptr_t weight, uintptr_t target, uintptr_t rows, uintptr_t loss, uintptr_t grad_hidden,
         int64_t num_rows, int64_t dim, int64_t vocab, int64_t hidden_stride, int64_t weight_stride, bool bfloat16,
         const std::string& isa, int num_threads) {
        const auto chosen = isa_of(isa);
        py::gil_scoped_release release;
        luthier::linear_cross_entropy(
            {at<const void>(hidden), at<const void>(weight), at<const int64_t>(target), at<const int64_t>(rows),
             at<float>(loss), at<float>(grad_hidden), num_rows, dim, vocab, hidden_stride, weight_stride,
             bfloat16 ? luthier::Dtype::bfloat16 : luthier::Dtype::float32},
            chosen, num_threads);
      },
      py::kw_only(), py::arg("hidden"), py::arg("weight"), py::arg("target"), py::arg("rows"), py::arg("loss"),
      py::arg("grad_hidden"), py::arg("num_rows"), py::arg("dim"), py::arg("vocab"), py::arg("hidden_stride"),
      py::arg("weight_stride"), py::arg("bfloat16"), py::arg("isa"), py::arg("num_threads"));
}
