#pragma once

namespace luthier {

// Instruction sets that kernels are compiled for, in rising order of preference. amx_bf16 is what processors with tiles
// run: conversions of AVX-512-BF16, products by AVX-512's multiply-add, which is faster there than vdpbf16ps.
enum class Isa { plain, avx2, avx512, avx512_bf16, amx_bf16 };

// Whether this processor and its operating system can run code compiled for `isa`.
bool supports(Isa isa);

}  // namespace luthier
