#pragma once

#include "luthier/linear_cross_entropy.hpp"

namespace luthier::detail {

// The vocabulary is cut here whatever the rows and threads are, so that a row's sums have one order.
constexpr int64_t kVocabSegment = 16384;

// What a segment of the vocabulary contributes to a row: its greatest score, the sum of exponentials e of
// (score - greatest), and the plain sum of scores (smoothing) or that of e * (score - greatest) (entropy).
struct RowState {
  float greatest, sum, total, target_score, target_slope;
};

// Beside the head's rows weighted with e, a task sums them unweighted (smoothing), or weighted
// with e * (score - greatest) (entropy).
bool has_second_sum(const LinearCrossEntropy& p);

// Rows [first, last) of the chosen ones and the segments [segment, end_segment) of the vocabulary, merged in order.
struct LossTask {
  int64_t first, last, segment, end_segment;
  RowState* states;  // [last - first]
  float* sums;       // [last - first][sums_stride]: weighted rows of the head, then the second sum; or null
  int64_t sums_stride;
};

}  // namespace luthier::detail
