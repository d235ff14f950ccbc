#pragma once

#include "attention.hpp"
#include "attention_decode.hpp"
#include "linear_cross_entropy.hpp"
#include "luthier/adamw_8bit.hpp"
#include "luthier/cpuid.hpp"
#include "luthier/dequantise.hpp"
#include "luthier/elementwise.hpp"
#include "luthier/product.hpp"

namespace luthier::detail {

// What each per-ISA file defines, by Dtype where there are two.
struct Kernels {
  void (*product[2])(const Product&, int num_threads);
  void (*gram[2])(const Gram*, int num_problems, int num_threads);
  void (*attention[2])(const Attention&, const AttentionTask&);
  void (*attention_gradient[2])(const AttentionGradient&, const AttentionTask&);
  void (*decode_append[2])(const DecodeWork&, const DecodeBlock&);
  void (*decode_attend[2])(const DecodeWork&, const DecodeTask&);
  void (*decode_merge[2])(const DecodeWork&, const DecodeBlock&);
  void (*loss[2])(const LinearCrossEntropy&, const LossTask&);
  void (*finish_loss[2])(const LinearCrossEntropy&, int64_t row, const RowState&, const float* sums);
  void (*merge_loss)(const LinearCrossEntropy&, const RowState& part, const float* from, RowState& all, float* to);
  void (*rms_norm[2])(const RmsNorm&, int num_threads);
  void (*rms_norm_gradient[2])(const RmsNorm&, const void* grad_out, int64_t grad_stride, int num_threads);
  void (*rope[2])(const Rope&, int num_threads);
  void (*gated[2])(const Gated&, int num_threads);
  void (*dropout[2])(const Dropout&, int num_threads);
  void (*round_to[2])(const Rounding*, int num_problems, int num_threads);
  void (*dequantise[2])(const Dequantise&, int num_threads);
  void (*adamw_8bit)(const AdamW8&, int num_threads);
};

extern const Kernels kernels_plain, kernels_avx2, kernels_avx512, kernels_avx512_bf16, kernels_amx_bf16;

// Throws std::invalid_argument when this processor lacks the instruction set.
const Kernels& kernels_of(Isa isa);

}  // namespace luthier::detail
