#pragma once

#include "luthier/attention.hpp"

namespace luthier::detail {

// Queries [first, last) of the heads that share a key head, of the sequence that starts at token `begin`.
struct AttentionTask {
  int64_t begin, first, last, key_head;
};

}  // namespace luthier::detail
