#pragma once

#include "luthier/attention_decode.hpp"

namespace luthier::detail {

// What is summed is [rows of scores][kept_columns] floats: head_dim, rounded up for the panels of any instruction set.
constexpr int64_t kDecodeColumns = 64;
// Keys whose scores and packed copies are held at a time. Counted from the first that a row sees, so that its bits do
// not depend on where its cache begins.
constexpr int64_t kDecodeKeys = 256;

// Where a row of the pass stands in its cache, the first key that its queries see, and the first of its rows of scores.
struct DecodeRow {
  int64_t cache, row, first_key, num_parts, scores;
};

// The first row of a cache among those of the pass, among queries as they are turned, and its prefix's rows of scores.
struct DecodeCache {
  int64_t first_row, queries, prefix_scores, num_parts;
};

// Keys [begin, end) of a prefix, or of a row (`num_rows` is 0), counted from the first that it sees, against the
// queries of a key head: of rows [row, row + num_rows) of the cache, or of row `row` of the pass.
struct DecodeTask {
  int64_t cache, row, num_rows, key_head, part, begin, end;
};

// How a problem is cut, and what its tasks leave for each other.
struct DecodeWork {
  const AttentionDecode& problem;
  const DecodeRow* rows;
  const DecodeCache* caches;
  int64_t group, columns;  // queries of a row that share a key head; columns of a row of sums
  void* queries;           // [caches][key heads][rows][group][head_dim], turned
  float* sums;             // [rows of scores][columns], not divided
  float* statistics;       // [rows of scores][2]: the greatest score, and the sum of exponentials of (score - greatest)
};

}  // namespace luthier::detail
