// The only file that includes pybind11: it exposes the torch-free kernels as functions over raw pointers.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_core, module) { module.doc() = "Luthier's CPU kernels."; }
