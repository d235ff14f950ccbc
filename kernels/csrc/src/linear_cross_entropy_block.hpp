#pragma once

#include "luthier/linear_cross_entropy.hpp"

namespace luthier::detail {

constexpr int64_t kVocabChunk = 256;

// Scratch of one thread, 64-byte aligned; `lanes` is the block's tokens rounded up to whole panels.
struct Scratch {
  char* hidden;   // lanes * (dim + 1) floats: packed [panel][k][lane]
  char* weight;   // kVocabChunk * (dim + 1) floats: a chunk of the head, converted or interleaved
  float* logits;  // lanes * vocab: [panel][vocab][lane]
  char* dlogits;  // panel * kVocabChunk floats
  float* grad;    // lanes * dim: [panel][dim][lane]
  float* max;     // lanes
  float* sum;     // lanes
};

// Computes rows [begin, end) of the problem.
using Block = void (*)(const LinearCrossEntropy&, int64_t begin, int64_t end, const Scratch&);

struct Kernel {
  int panel;
  Block float32, bfloat16;
};

// Each is defined in a file of its own, compiled for that instruction set.
extern const Kernel kernel_plain, kernel_avx2, kernel_avx512_bf16;

}  // namespace luthier::detail
