#pragma once

#include <cstdint>

#include "luthier/cpuid.hpp"
#include "luthier/dtype.hpp"

namespace luthier {

// Where element [token][head][i] of a tensor stands: at token * token_stride + head * head_stride + i elements.
struct Heads {
  void* elements;
  int64_t token_stride, head_stride;
};

// Causal attention of sequences that lie end to end, each to itself alone: sequence i holds the tokens
// [bounds[i], bounds[i + 1]). Query head h uses key and value head h / (num_heads / num_key_heads).
// A score is scale * q.k, then softcap * tanh(score / softcap) where softcap > 0; a query sees the last `window` tokens
// up to itself where window > 0.
struct Attention {
  Heads query, key, value, out;
  // [num_heads][num_tokens][2]: each row's greatest score, and its sum of exponentials of (score - greatest).
  float* statistics;
  const int64_t* bounds;
  int64_t num_sequences, num_heads, num_key_heads, head_dim;
  float scale, softcap;
  int64_t window;
  Dtype dtype;
};

// A row's bits depend neither on the number of threads nor on the other sequences.
void attention(const Attention& problem, Isa isa, int num_threads);

// Gradients of the inputs from that of `out`; `forward` is the problem as it was computed.
struct AttentionGradient {
  Attention forward;
  Heads grad_out, grad_query, grad_key, grad_value;
};

void attention_gradient(const AttentionGradient& problem, Isa isa, int num_threads);

}  // namespace luthier
