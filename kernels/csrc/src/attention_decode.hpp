#pragma once

#include "luthier/attention_decode.hpp"

namespace luthier::detail {

// What is summed is [rows of scores][kept_columns] floats: head_dim, rounded up for the panels of any instruction set.
constexpr int64_t kDecodeColumns = 64;
// Keys whose scores and packed copies are held at a time. Counted from the first that a row sees, so that its bits do
// not depend on where its cache begins, nor on which of its tokens come together.
constexpr int64_t kDecodeKeys = 256;

// Tokens of a row that attend together: the first among those of the pass and the column where it stands, the first key
// that they see, and the first of their rows of scores.
struct DecodeBlock {
  int64_t cache, row, token, column, num_tokens, first_key, num_parts, scores;
};

// Tokens of a cache among those of the pass, where their queries begin as they are turned, and the rows of scores of
// its prefix.
struct DecodeCache {
  int64_t first_token, num_tokens, queries, prefix_scores, num_parts;
};

// Keys [begin, end) of a prefix (`block` is -1), or of a block's row, counted from the first that it sees, against
// queries [query, query + num_queries) of a key head of the cache.
struct DecodeTask {
  int64_t cache, block, query, num_queries, key_head, part, begin, end;
};

// How a problem is cut, and what its tasks leave for each other.
struct DecodeWork {
  const AttentionDecode& problem;
  const DecodeBlock* blocks;
  const DecodeCache* caches;
  int64_t per_head, columns;  // queries of a token that share a key head; columns of a row of sums
  void* queries;              // [caches][key heads][tokens][per_head][head_dim], turned
  float* sums;                // [rows of scores][columns], not divided
  float* statistics;  // [rows of scores][2]: the greatest score, and the sum of exponentials of (score - greatest)
};

}  // namespace luthier::detail
