#pragma once

namespace luthier {

// Instruction sets that kernels are compiled for, in rising order of preference.
enum class Isa { plain, avx2, avx512, avx512_bf16 };

// Whether this processor and its operating system can run code compiled for `isa`.
bool supports(Isa isa);

}  // namespace luthier
