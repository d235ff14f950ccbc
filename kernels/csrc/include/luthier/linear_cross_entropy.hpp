#pragma once

#include <cstdint>

#include "luthier/cpuid.hpp"
#include "luthier/dtype.hpp"

namespace luthier {

// Cross-entropy of softmax(u) at `num_rows` chosen rows, with u = softcap * tanh(hidden weight^T / softcap) where
// softcap > 0, and u = hidden weight^T elsewhere. A row's loss is
//   token_weight * ((1 - label_smoothing) * (lse - u[target]) + label_smoothing * (lse - mean u) + z_loss * lse^2).
// Strides are in elements; the last dimension is contiguous; pointers need only the alignment of their element.
struct LinearCrossEntropy {
  const void* hidden;         // [*, dim], rows `hidden_stride` apart
  const void* weight;         // [vocab, dim], rows `weight_stride` apart
  const int64_t* target;      // indexed by row; at every chosen row in [0, vocab)
  const float* token_weight;  // indexed by row; null: 1
  const int64_t* rows;        // [num_rows] which rows count
  float* loss;                // [num_rows] out
  float* grad_hidden;         // [num_rows, dim] dense out, of the chosen rows alone; null: not computed
  float* entropy;             // [num_rows] out: -sum of softmax * log softmax; null: not computed, as with smoothing
  float* grad_entropy;        // [num_rows, dim] dense out: its gradient to hidden; null where grad_hidden or entropy is
  int64_t num_rows, dim, vocab, hidden_stride, weight_stride;
  float softcap, label_smoothing, z_loss;
  Dtype dtype;
};

// A row's bits depend neither on `num_threads` nor on the other rows. The logits are never held: the gradient is summed
// as attention sums values (FlashAttention, arXiv:2205.14135), the head being keys and values.
// Memory: per thread about 150 rows of hidden and gradient; for few rows, num_rows * dim floats per 16,384 of vocab.
// Throws std::bad_alloc, std::invalid_argument.
void linear_cross_entropy(const LinearCrossEntropy& problem, Isa isa, int num_threads);

}  // namespace luthier
