#include "luthier/attention_decode.hpp"

#include <algorithm>
#include <vector>

#include "attention_decode.hpp"
#include "kernels.hpp"
#include "luthier/parallel.hpp"

namespace luthier {
namespace {

using detail::DecodeCache;
using detail::DecodeRow;
using detail::DecodeTask;
using detail::DecodeWork;
using detail::kDecodeColumns;
using detail::kDecodeKeys;

constexpr int64_t kPrefixQueries = 96;

int64_t parts_of(int64_t keys) { return (keys + kDecodeKeys - 1) / kDecodeKeys; }

struct Cut {
  std::vector<DecodeRow> rows;
  std::vector<DecodeCache> caches;
  std::vector<DecodeTask> tasks;
  int64_t num_queries = 0, num_scores = 0;
};

void cut_prefix(const AttentionDecode& p, int64_t cache, int64_t group, Cut& cut) {
  const CachedRows& held = p.caches[cache];
  const int64_t most_rows = std::max<int64_t>(1, kPrefixQueries / group);
  for (int64_t part = 0; part < parts_of(held.num_prefix); ++part)
    for (int64_t head = 0; head < p.num_key_heads; ++head)
      for (int64_t row = 0; row < held.num_rows; row += most_rows)
        cut.tasks.push_back({cache, row, std::min(most_rows, held.num_rows - row), head, part, part * kDecodeKeys,
                             std::min((part + 1) * kDecodeKeys, held.num_prefix)});
}

void cut_row(const AttentionDecode& p, int64_t row, Cut& cut) {
  const DecodeRow& own = cut.rows[row];
  const int64_t num_keys = p.caches[own.cache].num_held + p.num_new - own.first_key;
  for (int64_t part = 0; part < own.num_parts; ++part)
    for (int64_t head = 0; head < p.num_key_heads; ++head)
      cut.tasks.push_back(
          {own.cache, row, 0, head, part, part * kDecodeKeys, std::min((part + 1) * kDecodeKeys, num_keys)});
}

// The tasks of prefixes first: they are the longest.
Cut cut_of(const AttentionDecode& p, int64_t group) {
  Cut cut;
  for (int64_t c = 0; c < p.num_caches; ++c) {
    const CachedRows& held = p.caches[c];
    const int64_t scores = held.num_rows * p.num_key_heads * group, parts = parts_of(held.num_prefix);
    cut.caches.push_back({static_cast<int64_t>(cut.rows.size()), cut.num_queries, cut.num_scores, parts});
    cut.num_queries += scores;
    cut.num_scores += parts * scores;
    for (int64_t r = 0; r < held.num_rows; ++r) {
      // The first of the new tokens sees at least itself.
      const int64_t first = std::min(p.first[cut.rows.size()], held.num_held);
      const int64_t own_parts = parts_of(held.num_held + p.num_new - first);
      cut.rows.push_back({c, r, first, own_parts, cut.num_scores});
      cut.num_scores += own_parts * p.num_key_heads * group;
    }
    cut_prefix(p, c, group, cut);
  }
  for (int64_t row = 0; row < static_cast<int64_t>(cut.rows.size()); ++row) cut_row(p, row, cut);
  return cut;
}

template <class Task>
struct Run {
  const DecodeWork& work;
  const Task* tasks;
  void (*compute)(const DecodeWork&, const Task&);
};

template <class Task>
void run_all(const DecodeWork& work, const Task* tasks, int64_t num_tasks, int num_threads,
             void (*compute)(const DecodeWork&, const Task&)) {
  Run<Task> run{work, tasks, compute};
  parallel(
      num_tasks, num_threads,
      [](void* context, int64_t index) {
        const auto& all = *static_cast<const Run<Task>*>(context);
        all.compute(all.work, all.tasks[index]);
      },
      &run);
}

}  // namespace

void attention_decode(const AttentionDecode& problem, Isa isa, int num_threads) {
  const auto& kernels = detail::kernels_of(isa);
  const int type = static_cast<int>(problem.dtype);
  const int64_t group = problem.num_new * (problem.num_heads / problem.num_key_heads);
  const int64_t columns = (problem.head_dim + kDecodeColumns - 1) / kDecodeColumns * kDecodeColumns;
  const Cut cut = cut_of(problem, group);
  if (cut.rows.empty()) return;
  const int64_t query_bytes = (cut.num_queries * problem.head_dim * int64_t{sizeof(float)} + 63) / 64 * 64;
  const int64_t sum_bytes = cut.num_scores * columns * int64_t{sizeof(float)};
  char* memory = shared_scratch(query_bytes + sum_bytes + cut.num_scores * 2 * int64_t{sizeof(float)});
  const DecodeWork work{problem,
                        cut.rows.data(),
                        cut.caches.data(),
                        group,
                        columns,
                        memory,
                        reinterpret_cast<float*>(memory + query_bytes),
                        reinterpret_cast<float*>(memory + query_bytes + sum_bytes)};
  const auto num_rows = static_cast<int64_t>(cut.rows.size());
  run_all(work, cut.rows.data(), num_rows, num_threads, kernels.decode_append[type]);
  run_all(work, cut.tasks.data(), static_cast<int64_t>(cut.tasks.size()), num_threads, kernels.decode_attend[type]);
  run_all(work, cut.rows.data(), num_rows, num_threads, kernels.decode_merge[type]);
}

}  // namespace luthier
