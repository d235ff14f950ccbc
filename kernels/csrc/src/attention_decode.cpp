#include "luthier/attention_decode.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
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

std::string shape_of(Dtype dtype, const std::string& first, int64_t heads, const std::string& third, int64_t size) {
  return std::string(dtype == Dtype::bfloat16 ? "bfloat16" : "float32") + " [" + first + ", " + std::to_string(heads) +
         ", " + third + ", " + std::to_string(size) + "]";
}

void require_heads(const AttentionDecode& p) {
  if (p.num_key_heads < 1 || p.num_heads < 1 || p.num_heads % p.num_key_heads || p.head_dim < 1 || p.num_new < 1)
    throw std::invalid_argument(
        "heads must be at least 1, those of queries a multiple of those of keys, and so must their size and the new "
        "tokens, got " +
        std::to_string(p.num_heads) + " and " + std::to_string(p.num_key_heads) + " heads of " +
        std::to_string(p.head_dim) + ", " + std::to_string(p.num_new) + " new tokens");
  const bool turns = p.cos || p.sin;
  if (turns && !(p.cos && p.sin && p.rotary_dim > 0 && p.rotary_dim % 2 == 0 && p.rotary_dim <= p.head_dim))
    throw std::invalid_argument("angles must be cosines and sines [tokens, R], R even and at most " +
                                std::to_string(p.head_dim) + ", got an R of " + std::to_string(p.rotary_dim));
  const bool has_all = p.query.elements && p.new_key.elements && p.new_value.elements && p.out && p.first;
  if (p.num_rows > 0 && !has_all) throw std::invalid_argument("an address is missing");
}

void require_cache(const AttentionDecode& p, const CachedRows& cache) {
  const bool fits = cache.num_key_heads == p.num_key_heads && cache.head_dim == p.head_dim && cache.dtype == p.dtype;
  if (!fits || cache.num_rows < 0 || cache.num_prefix < 0)
    throw std::invalid_argument("a cache must hold " + shape_of(p.dtype, "B", p.num_key_heads, "C", p.head_dim) +
                                ", got " +
                                shape_of(cache.dtype, std::to_string(cache.num_rows), cache.num_key_heads,
                                         std::to_string(cache.capacity), cache.head_dim) +
                                " behind " + std::to_string(cache.num_prefix) + " tokens");
  if (cache.num_held < 0 || cache.num_held + p.num_new > cache.capacity)
    throw std::invalid_argument("a cache needs room for " + std::to_string(p.num_new) + " new tokens after " +
                                std::to_string(cache.num_held) + ", got a capacity of " +
                                std::to_string(cache.capacity));
  const bool has_own = cache.key && cache.value, has_prefix = cache.prefix_key && cache.prefix_value;
  if (cache.num_rows > 0 && (!has_own || (cache.num_prefix > 0 && !has_prefix)))
    throw std::invalid_argument("an address of a cache is missing");
}

}  // namespace

void require_fitting(const AttentionDecode& problem) {
  require_heads(problem);
  int64_t num_rows = 0;
  for (int64_t c = 0; c < problem.num_caches; ++c) {
    require_cache(problem, problem.caches[c]);
    num_rows += problem.caches[c].num_rows;
  }
  if (num_rows != problem.num_rows)
    throw std::invalid_argument("caches must hold " + std::to_string(problem.num_rows) + " rows, got " +
                                std::to_string(num_rows));
  if (problem.num_rows * problem.num_new > problem.num_tokens)
    throw std::invalid_argument("tokens must be at least " + std::to_string(problem.num_rows * problem.num_new) +
                                ", those that are new, got " + std::to_string(problem.num_tokens));
  for (int64_t row = 0; row < problem.num_rows; ++row)
    if (problem.first[row] < 0)
      throw std::invalid_argument("first keys must not be negative, got " + std::to_string(problem.first[row]));
}

void attention_decode(const AttentionDecode& problem, Isa isa, int num_threads) {
  require_fitting(problem);
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
