#include "luthier/attention.hpp"

#include <algorithm>
#include <vector>

#include "attention.hpp"
#include "kernels.hpp"
#include "luthier/parallel.hpp"

namespace luthier {
namespace {

using detail::AttentionTask;

// The longest tasks first, so that no thread is left alone with one at the end.
std::vector<AttentionTask> tasks_of(const Attention& p, int64_t most_queries) {
  std::vector<AttentionTask> tasks;
  for (int64_t i = 0; i < p.num_sequences; ++i)
    for (int64_t first = p.bounds[i]; first < p.bounds[i + 1]; first += most_queries)
      for (int64_t head = 0; head < p.num_key_heads; ++head)
        tasks.push_back({p.bounds[i], first, std::min(first + most_queries, p.bounds[i + 1]), head});
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const AttentionTask& a, const AttentionTask& b) { return a.last - a.begin > b.last - b.begin; });
  return tasks;
}

template <class Problem>
struct Run {
  const Problem& problem;
  const std::vector<AttentionTask>& tasks;
  void (*compute)(const Problem&, const AttentionTask&);
};

template <class Problem>
void run_all(const Problem& problem, const std::vector<AttentionTask>& tasks, int num_threads,
             void (*compute)(const Problem&, const AttentionTask&)) {
  Run<Problem> run{problem, tasks, compute};
  parallel(
      static_cast<int64_t>(tasks.size()), num_threads,
      [](void* context, int64_t index) {
        const auto& all = *static_cast<const Run<Problem>*>(context);
        all.compute(all.problem, all.tasks[index]);
      },
      &run);
}

constexpr int64_t kQueriesOfTask = 256, kNoLimit = INT64_MAX / 2;

}  // namespace

void attention(const Attention& problem, Isa isa, int num_threads) {
  run_all(problem, tasks_of(problem, kQueriesOfTask), num_threads,
          detail::kernels_of(isa).attention[int(problem.dtype)]);
}

void attention_gradient(const AttentionGradient& problem, Isa isa, int num_threads) {
  // A sequence in one piece: the gradients of its keys sum over its queries, in one order.
  run_all(problem, tasks_of(problem.forward, kNoLimit), num_threads,
          detail::kernels_of(isa).attention_gradient[int(problem.forward.dtype)]);
}

}  // namespace luthier
