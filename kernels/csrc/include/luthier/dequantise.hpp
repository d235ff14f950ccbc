#pragma once

#include <cstdint>

#include "luthier/cpuid.hpp"
#include "luthier/dtype.hpp"

namespace luthier {

// out = value of each code * scale of its block, rounded once. With `levels` a code has 4 bits and its value is
// levels[code], two codes in a byte, the first in the upper half, and `block` is even; without a code is an int8 and
// its own value.
struct Dequantise {
  const void* codes;
  const float* levels;  // [16], or null
  const float* scales;  // [num_blocks]
  void* out;            // [num_blocks][block], dense
  int64_t num_blocks, block;
  Dtype dtype;
};

void dequantise(const Dequantise& problem, Isa isa, int num_threads);

}  // namespace luthier
