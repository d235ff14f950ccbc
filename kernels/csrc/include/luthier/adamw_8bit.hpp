#pragma once

#include <cstdint>

#include "luthier/cpuid.hpp"

namespace luthier {

// One of AdamW's moments in 8 bits (arXiv:2110.02861): values[code] * scale of the code's block.
struct Moment8 {
  uint8_t* codes;
  float* scales;           // [num_blocks]
  const float* values;     // [256], rising
  const uint8_t* nearest;  // [65536]: by the upper half of a float's bits the code of the last value that is not above
                           // any float with that upper half; 0 where there is none
};

// An update of AdamW (arXiv:1711.05101) in place, block by block: moments are widened, changed, used, and rounded to
// the nearest value of what their block's greatest is 1 of.
struct AdamW8 {
  float* weight;      // [num_blocks][block]
  const float* grad;  // likewise
  Moment8 mean, square;
  int64_t num_blocks, block;
  float learning_rate, decay, beta1, beta2, epsilon;
  float correction1, correction2;  // 1 - beta1^t and the root of 1 - beta2^t
};

void adamw_8bit(const AdamW8& problem, Isa isa, int num_threads);

}  // namespace luthier
