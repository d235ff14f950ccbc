#pragma once

#include <cstdint>

#include "luthier/attention.hpp"
#include "luthier/cpuid.hpp"
#include "luthier/dtype.hpp"

namespace luthier {

// Rows whose keys and values lie in one cache: [num_rows][num_key_heads][capacity][head_dim], of which columns
// [num_held, num_held + num_new) are written now; and what all of them see before that:
// [num_key_heads][num_prefix][head_dim], nothing where num_prefix is 0. All dense.
struct CachedRows {
  void *key, *value;
  const void *prefix_key, *prefix_value;
  int64_t num_rows, capacity, num_held, num_new, num_prefix, num_key_heads, head_dim;
  Dtype dtype;
};

// Attention of new tokens of rows over what their caches hold. A row has one for each column of its cache that is
// written now and does not come before its `first`: none where that is beyond them. The new keys and values are put
// into the caches first. With `cos` and `sin`, [tokens][rotary_dim], queries and new keys are turned before, as Rope
// does. A query sees the prefix and the keys of its row from `first` up to its own column. Query head h uses key head
// h / (num_heads / num_key_heads); a score is scale * q.k, then softcap * tanh(score / softcap) where softcap > 0.
// Tokens are numbered through: those of a row one after the other, the rows of all caches in their order.
struct AttentionDecode {
  Heads query, new_key, new_value;
  void* out;  // [tokens][num_heads][head_dim], dense
  const void *cos, *sin;
  const CachedRows* caches;
  const int64_t* first;  // column of each row
  int64_t num_caches;
  int64_t num_rows;    // of all caches together
  int64_t num_tokens;  // that query, keys, values and out have place for
  int64_t num_heads, num_key_heads, head_dim, rotary_dim;
  float scale, softcap;
  Dtype dtype;
};

// Throws std::invalid_argument where caches, rows, sizes or types do not fit each other, or an address is missing.
void require_fitting(const AttentionDecode& problem);

// The new tokens of all rows, of a problem that fits.
int64_t tokens_of(const AttentionDecode& problem);

// The bits of a token depend neither on the number of threads, nor on other rows, nor on how its cache is shared, nor
// on how many tokens of its row come in one call. Throws as require_fitting, before anything is read or written.
void attention_decode(const AttentionDecode& problem, Isa isa, int num_threads);

}  // namespace luthier
