#include "luthier/linear_cross_entropy.hpp"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "kernels.hpp"
#include "luthier/parallel.hpp"

namespace luthier {

bool detail::has_second_sum(const LinearCrossEntropy& p) { return p.label_smoothing > 0 || p.grad_entropy; }

namespace {

using detail::kVocabSegment;
using detail::LossTask;
using detail::RowState;

// A multiple of the panel of every instruction set.
constexpr int64_t kWidestPanel = 64;

// Rows whose hidden states and sums stay in the second cache.
int64_t most_rows(int64_t dim) { return std::clamp<int64_t>(1024 * 1024 / (6 * dim), 48, 288); }

int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// The vocabulary's segments are merged in order, whoever computes them: all of a row's by one task, or, where there are
// too few rows to go round, each by its own.
struct Run {
  const LinearCrossEntropy& problem;
  const detail::Kernels& kernels;
  int64_t num_segments, num_groups, block, num_blocks, sums_stride;
  std::vector<RowState> states;  // [num_groups][num_rows]
  std::vector<float> sums;       // [num_groups][num_rows][sums_stride], where the gradient is asked for

  Run(const LinearCrossEntropy& p, const detail::Kernels& k, int num_threads) : problem(p), kernels(k) {
    num_segments = (p.vocab + kVocabSegment - 1) / kVocabSegment;
    num_groups = p.num_rows < 24 * num_threads ? num_segments : 1;
    const int64_t sharers = num_groups > 1 ? 1 : num_threads;
    const int64_t rounds = (p.num_rows + sharers * most_rows(p.dim) - 1) / (sharers * most_rows(p.dim));
    block = round_up((p.num_rows + rounds * sharers - 1) / (rounds * sharers), 6);
    num_blocks = (p.num_rows + block - 1) / block;
    sums_stride = round_up(p.dim, kWidestPanel) * (detail::has_second_sum(p) ? 2 : 1);
    states.resize(num_groups * p.num_rows);
    sums.resize(p.grad_hidden ? num_groups * p.num_rows * sums_stride : 0);
  }

  RowState* state(int64_t group, int64_t row) { return &states[group * problem.num_rows + row]; }
  float* sum(int64_t group, int64_t row) {
    return problem.grad_hidden ? &sums[(group * problem.num_rows + row) * sums_stride] : nullptr;
  }

  void compute(int64_t index) {
    const int64_t group = index / num_blocks, first = index % num_blocks * block;
    const LossTask task{first,
                        std::min(first + block, problem.num_rows),
                        group,
                        num_groups > 1 ? group + 1 : num_segments,
                        state(group, first),
                        sum(group, first),
                        sums_stride};
    kernels.loss[int(problem.dtype)](problem, task);
  }

  void finish(int64_t row) {
    for (int64_t group = 1; group < num_groups; ++group)
      kernels.merge_loss(problem, *state(group, row), sum(group, row), *state(0, row), sum(0, row));
    kernels.finish_loss[int(problem.dtype)](problem, row, *state(0, row), sum(0, row));
  }
};

constexpr int64_t kFinishedRows = 16;

}  // namespace

void linear_cross_entropy(const LinearCrossEntropy& problem, Isa isa, int num_threads) {
  if (num_threads < 1) throw std::invalid_argument("num_threads must be at least 1");
  const detail::Kernels& kernels = detail::kernels_of(isa);
  if (problem.num_rows == 0) return;
  Run run(problem, kernels, num_threads);
  parallel(
      run.num_groups * run.num_blocks, num_threads,
      [](void* context, int64_t index) { static_cast<Run*>(context)->compute(index); }, &run);
  parallel((problem.num_rows + kFinishedRows - 1) / kFinishedRows, num_threads,
           [](void* context, int64_t index) {
             Run& all = *static_cast<Run*>(context);
             const int64_t last = std::min((index + 1) * kFinishedRows, all.problem.num_rows);
             for (int64_t row = index * kFinishedRows; row < last; ++row) all.finish(row);
           },
           &run);
}

}  // namespace luthier
