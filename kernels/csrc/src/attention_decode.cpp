#include "luthier/attention_decode.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "attention_decode.hpp"
#include "kernels.hpp"
#include "luthier/parallel.hpp"

namespace luthier {
namespace {

using detail::DecodeBlock;
using detail::DecodeCache;
using detail::DecodeTask;
using detail::DecodeWork;
using detail::kDecodeColumns;
using detail::kDecodeKeys;

// Queries of a task: their scores and weights stay in the second cache.
constexpr int64_t kPrefixQueries = 96, kBlockQueries = 144;
// What tasks may leave for each other at a time; a block that leaves more is alone.
constexpr int64_t kMostSums = int64_t{1} << 23;

int64_t parts_of(int64_t keys) { return (keys + kDecodeKeys - 1) / kDecodeKeys; }

// The first column of a row that is written now, and how many are.
int64_t begin_of(const CachedRows& cache, int64_t first) { return std::max(first, cache.num_held); }
int64_t count_of(const CachedRows& cache, int64_t first) {
  return std::max<int64_t>(0, cache.num_held + cache.num_new - begin_of(cache, first));
}

// All new tokens of all rows in blocks, in the order of tokens.
std::vector<DecodeBlock> blocks_of(const AttentionDecode& p, int64_t per_head) {
  std::vector<DecodeBlock> blocks;
  const int64_t most = std::max<int64_t>(1, kBlockQueries / per_head);
  int64_t row = 0, token = 0;
  for (int64_t c = 0; c < p.num_caches; ++c)
    for (int64_t r = 0; r < p.caches[c].num_rows; ++r, ++row) {
      const int64_t first = p.first[row], begin = begin_of(p.caches[c], first), count = count_of(p.caches[c], first);
      for (int64_t i = 0; i < count; i += most) {
        const int64_t tokens = std::min(most, count - i);
        blocks.push_back({c, r, token + i, begin + i, tokens, first, parts_of(begin + i + tokens - first), 0});
      }
      token += count;
    }
  return blocks;
}

// Some blocks, the caches that they are of, and their tasks.
struct Cut {
  std::vector<DecodeBlock> blocks;
  std::vector<DecodeCache> caches;
  std::vector<DecodeTask> tasks;
  int64_t num_queries = 0, num_scores = 0;
};

// Rows of scores that a block leaves for its own keys and its prefix's.
int64_t scores_of(const AttentionDecode& p, const DecodeBlock& block) {
  return (block.num_parts + parts_of(p.caches[block.cache].num_prefix)) * block.num_tokens * p.num_heads;
}

void cut_prefix(const AttentionDecode& p, int64_t cache, int64_t per_head, Cut& cut) {
  const int64_t num_prefix = p.caches[cache].num_prefix, queries = cut.caches[cache].num_tokens * per_head;
  for (int64_t part = 0; part < cut.caches[cache].num_parts; ++part)
    for (int64_t head = 0; head < p.num_key_heads; ++head)
      for (int64_t query = 0; query < queries; query += kPrefixQueries)
        cut.tasks.push_back({cache, -1, query, std::min(kPrefixQueries, queries - query), head, part,
                             part * kDecodeKeys, std::min((part + 1) * kDecodeKeys, num_prefix)});
}

void cut_block(const AttentionDecode& p, int64_t index, int64_t per_head, Cut& cut) {
  const DecodeBlock& own = cut.blocks[index];
  const int64_t num_keys = own.column + own.num_tokens - own.first_key;
  const int64_t query = (own.token - cut.caches[own.cache].first_token) * per_head;
  for (int64_t part = 0; part < own.num_parts; ++part)
    for (int64_t head = 0; head < p.num_key_heads; ++head)
      cut.tasks.push_back({own.cache, index, query, own.num_tokens * per_head, head, part, part * kDecodeKeys,
                           std::min((part + 1) * kDecodeKeys, num_keys)});
}

// The tasks of prefixes first: they are the longest.
Cut cut_of(const AttentionDecode& p, std::vector<DecodeBlock> blocks, int64_t per_head) {
  Cut cut;
  cut.blocks = std::move(blocks);
  cut.caches.assign(p.num_caches, {});
  for (DecodeBlock& block : cut.blocks) {
    DecodeCache& cache = cut.caches[block.cache];
    if (cache.num_tokens == 0) cache.first_token = block.token;
    cache.num_tokens += block.num_tokens;
    block.scores = cut.num_scores;
    cut.num_scores += block.num_parts * block.num_tokens * p.num_heads;
  }
  for (int64_t c = 0; c < p.num_caches; ++c) {
    DecodeCache& cache = cut.caches[c];
    const int64_t queries = cache.num_tokens * p.num_heads;
    cache.num_parts = parts_of(p.caches[c].num_prefix);
    cache.queries = cut.num_queries;
    cache.prefix_scores = cut.num_scores;
    cut.num_queries += queries;
    cut.num_scores += cache.num_parts * queries;
    cut_prefix(p, c, per_head, cut);
  }
  for (int64_t i = 0; i < static_cast<int64_t>(cut.blocks.size()); ++i) cut_block(p, i, per_head, cut);
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
  if (p.num_key_heads < 1 || p.num_heads < 1 || p.num_heads % p.num_key_heads || p.head_dim < 1)
    throw std::invalid_argument(
        "heads must be at least 1, those of queries a multiple of those of keys, and so must be their size, got " +
        std::to_string(p.num_heads) + " and " + std::to_string(p.num_key_heads) + " heads of " +
        std::to_string(p.head_dim));
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
  if (cache.num_held < 0 || cache.num_new < 1 || cache.num_held + cache.num_new > cache.capacity)
    throw std::invalid_argument("a cache needs room for " + std::to_string(cache.num_new) + " new tokens after " +
                                std::to_string(cache.num_held) + ", got a capacity of " +
                                std::to_string(cache.capacity));
  const bool has_own = cache.key && cache.value, has_prefix = cache.prefix_key && cache.prefix_value;
  if (cache.num_rows > 0 && (!has_own || (cache.num_prefix > 0 && !has_prefix)))
    throw std::invalid_argument("an address of a cache is missing");
}

struct Sizes {
  int64_t per_head, columns;
};

void attend_together(const AttentionDecode& problem, const Cut& cut, const Sizes& sizes, Isa isa, int num_threads) {
  const auto& kernels = detail::kernels_of(isa);
  const int type = static_cast<int>(problem.dtype);
  const int64_t query_bytes = (cut.num_queries * problem.head_dim * int64_t{sizeof(float)} + 63) / 64 * 64;
  const int64_t sum_bytes = cut.num_scores * sizes.columns * int64_t{sizeof(float)};
  char* memory = shared_scratch(query_bytes + sum_bytes + cut.num_scores * 2 * int64_t{sizeof(float)});
  const DecodeWork work{problem,
                        cut.blocks.data(),
                        cut.caches.data(),
                        sizes.per_head,
                        sizes.columns,
                        memory,
                        reinterpret_cast<float*>(memory + query_bytes),
                        reinterpret_cast<float*>(memory + query_bytes + sum_bytes)};
  const auto num_blocks = static_cast<int64_t>(cut.blocks.size());
  run_all(work, cut.blocks.data(), num_blocks, num_threads, kernels.decode_append[type]);
  run_all(work, cut.tasks.data(), static_cast<int64_t>(cut.tasks.size()), num_threads, kernels.decode_attend[type]);
  run_all(work, cut.blocks.data(), num_blocks, num_threads, kernels.decode_merge[type]);
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
  for (int64_t row = 0; row < problem.num_rows; ++row)
    if (problem.first[row] < 0)
      throw std::invalid_argument("first keys must not be negative, got " + std::to_string(problem.first[row]));
  if (tokens_of(problem) > problem.num_tokens)
    throw std::invalid_argument("tokens must be at least " + std::to_string(tokens_of(problem)) +
                                ", those that are new, got " + std::to_string(problem.num_tokens));
}

int64_t tokens_of(const AttentionDecode& problem) {
  int64_t tokens = 0, row = 0;
  for (int64_t c = 0; c < problem.num_caches; ++c)
    for (int64_t r = 0; r < problem.caches[c].num_rows; ++r, ++row)
      tokens += count_of(problem.caches[c], problem.first[row]);
  return tokens;
}

void attention_decode(const AttentionDecode& problem, Isa isa, int num_threads) {
  require_fitting(problem);
  const int64_t per_head = problem.num_heads / problem.num_key_heads;
  const int64_t columns = (problem.head_dim + kDecodeColumns - 1) / kDecodeColumns * kDecodeColumns;
  const std::vector<DecodeBlock> all = blocks_of(problem, per_head);
  // A row's blocks come in order: what one sees was put into the cache before or with it.
  for (size_t begin = 0, end = 0; begin < all.size(); begin = end) {
    int64_t scores = 0;
    for (end = begin; end < all.size(); ++end) {
      const int64_t more = scores_of(problem, all[end]);
      if (end > begin && (scores + more) * columns > kMostSums) break;
      scores += more;
    }
    const Cut cut = cut_of(problem, {all.begin() + begin, all.begin() + end}, per_head);
    attend_together(problem, cut, {per_head, columns}, isa, num_threads);
  }
}

}  // namespace luthier
