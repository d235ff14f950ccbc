#pragma once

namespace luthier {

// Instruction sets that kernels are compiled for, in rising order of preference. amx_bf16 is what processors with tiles
// run: products of bfloat16 on tiles, everything else as AVX-512-BF16 has it.
enum class Isa { plain, avx2, avx512, avx512_bf16, amx_bf16 };

// Whether this processor and its operating system can run code compiled for `isa`; asks Linux for the use of tiles.
bool supports(Isa isa);

}  // namespace luthier
