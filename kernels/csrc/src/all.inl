// Every operator of one instruction set, as a table. The file that includes this defines LUTHIER_KERNELS, the table's
// name, and LUTHIER_BFLOAT16, the path of bfloat16 operands, besides what vector.inl asks for.
#include "adamw_8bit.inl"
#include "attention_decode.inl"
#include "attention_gradient.inl"
#include "dequantise.inl"
#include "elementwise.inl"
#include "kernels.hpp"
#include "linear_cross_entropy.inl"
#include "product.inl"

namespace luthier::detail {

const Kernels LUTHIER_KERNELS = {
    {product_of<FloatPath<float>>, product_of<LUTHIER_BFLOAT16>},
    {gram_of<FloatPath<float>>, gram_of<LUTHIER_BFLOAT16>},
    {attention_of<FloatPath<float>>, attention_of<LUTHIER_BFLOAT16>},
    {attention_gradient_of<FloatPath<float>>, attention_gradient_of<LUTHIER_BFLOAT16>},
    {decode_append_of<float>, decode_append_of<uint16_t>},
    {decode_attend_of<FloatPath<float>>, decode_attend_of<LUTHIER_BFLOAT16>},
    {decode_merge_of<float>, decode_merge_of<uint16_t>},
    {loss_of<FloatPath<float>>, loss_of<LUTHIER_BFLOAT16>},
    {finish_loss<FloatPath<float>>, finish_loss<LUTHIER_BFLOAT16>},
    merge_loss,
    {rms_norm_of<float>, rms_norm_of<uint16_t>},
    {rms_norm_gradient_of<float>, rms_norm_gradient_of<uint16_t>},
    {rope_of<float>, rope_of<uint16_t>},
    {gated_of<float>, gated_of<uint16_t>},
    {dropout_of<float>, dropout_of<uint16_t>},
    {round_to_of<float>, round_to_of<uint16_t>},
    {dequantise_of<float>, dequantise_of<uint16_t>},
    adamw_8bit_of,
};

}  // namespace luthier::detail
