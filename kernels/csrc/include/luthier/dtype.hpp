#pragma once

namespace luthier {

// How the elements of a tensor are stored: float, or bfloat16 in 16 bits.
enum class Dtype { float32, bfloat16 };

}  // namespace luthier
