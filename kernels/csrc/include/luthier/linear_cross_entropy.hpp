#pragma once

#include <cstdint>

#include "luthier/cpuid.hpp"

namespace luthier {

enum class Dtype { float32, bfloat16 };

// Cross-entropy of softmax(hidden weight^T) at `num_rows` chosen rows. Element strides; the last dimension is
// contiguous. Pointers need only the alignment of their element.
struct LinearCrossEntropy {
  const void* hidden;     // [*, dim], rows `hidden_stride` apart
  const void* weight;     // [vocab, dim], rows `weight_stride` apart
  const int64_t* target;  // indexed by row; at every chosen row in [0, vocab)
  const int64_t* rows;    // [num_rows] which rows count
  float* loss;            // [num_rows] out: loss of each chosen row
  float* grad_hidden;     // [*, dim] contiguous out: d loss / d hidden at the chosen rows; null: not computed
  int64_t num_rows, dim, vocab, hidden_stride, weight_stride;
  Dtype dtype;
};

// Every token's arithmetic is independent of its neighbours, so results do not depend on `num_threads`.
// Memory: num_threads * min(128, rows per thread) * vocab floats. Throws std::bad_alloc, std::invalid_argument.
void linear_cross_entropy(const LinearCrossEntropy& problem, Isa isa, int num_threads);

}  // namespace luthier
