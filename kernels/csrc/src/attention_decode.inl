// Attention of new tokens over caches. Each part of a row's keys, and of a prefix, leaves sums of its own, which
// are weighed against each other in the end: parts are computed apart, and those of a prefix for many rows at a time.
#pragma once
#include "attention.inl"
#include "attention_decode.hpp"
#include "elementwise.inl"

namespace luthier::detail {
namespace {

// Element [0] of a head's tokens in a cache or a prefix of `num_tokens` a head.
template <class Scalar>
Scalar* head_of(void* tokens, int64_t heads_before, int64_t num_tokens, int64_t head_dim) {
  return static_cast<Scalar*>(tokens) + heads_before * num_tokens * head_dim;
}
template <class Scalar>
const Scalar* head_of(const void* tokens, int64_t heads_before, int64_t num_tokens, int64_t head_dim) {
  return static_cast<const Scalar*>(tokens) + heads_before * num_tokens * head_dim;
}

// Turns the heads of one token from head `first` on, or copies them.
template <class Scalar>
void turn_heads(const AttentionDecode& p, int64_t token, const Heads& from, int64_t first, int64_t num_heads,
                Scalar* to, int64_t to_stride) {
  Rope turn{{at<Scalar>(from, token, first), 0, from.head_stride},
            {to, 0, to_stride},
            nullptr,
            nullptr,
            1,
            num_heads,
            p.head_dim,
            0,
            false,
            p.dtype};
  if (p.cos) {
    turn.cos = static_cast<const Scalar*>(p.cos) + token * p.rotary_dim;
    turn.sin = static_cast<const Scalar*>(p.sin) + token * p.rotary_dim;
    turn.rotary_dim = p.rotary_dim;
  }
  for (int64_t head = 0; head < num_heads; ++head) rope_head<Scalar>(turn, 0, head);
}

// Puts a block's new keys and values into its cache, and lays its queries out by key heads.
template <class Scalar>
void decode_append_of(const DecodeWork& work, const DecodeBlock& own) {
  const AttentionDecode& p = work.problem;
  const CachedRows& held = p.caches[own.cache];
  const DecodeCache& cache = work.caches[own.cache];
  for (int64_t i = 0; i < own.num_tokens; ++i) {
    const int64_t token = own.token + i, place = (own.column + i) * p.head_dim;
    for (int64_t head = 0; head < p.num_key_heads; ++head) {
      const int64_t tokens_before = head * cache.num_tokens + token - cache.first_token;
      const int64_t first = cache.queries + tokens_before * work.per_head;
      turn_heads<Scalar>(p, token, p.query, head * work.per_head, work.per_head,
                         static_cast<Scalar*>(work.queries) + first * p.head_dim, p.head_dim);
    }
    const int64_t heads_before = own.row * p.num_key_heads, stride = held.capacity * p.head_dim;
    turn_heads<Scalar>(p, token, p.new_key, 0, p.num_key_heads,
                       head_of<Scalar>(held.key, heads_before, held.capacity, p.head_dim) + place, stride);
    auto* values = head_of<Scalar>(held.value, heads_before, held.capacity, p.head_dim) + place;
    for (int64_t head = 0; head < p.num_key_heads; ++head)
      std::memcpy(values + head * stride, at<Scalar>(p.new_value, token, head), p.head_dim * sizeof(Scalar));
  }
}

template <class Path>
struct DecodePart {
  typedef typename Path::Scalar Scalar;
  typedef typename Path::Item Item;
  const DecodeWork& work;
  const DecodeTask& task;
  const AttentionDecode& p = work.problem;
  const CachedRows& held = p.caches[task.cache];
  const int64_t keys = task.end - task.begin, padded = round_up(keys, L);
  const bool is_prefix = task.block < 0;
  const DecodeBlock& own = work.blocks[is_prefix ? 0 : task.block];
  const int64_t num_queries = task.num_queries;
  Item *query_space, *weights, *key_items;
  float* scores;
  DimPanels<Path> values;

  DecodePart(const DecodeWork& w, const DecodeTask& t) : work(w), task(t) {
    Cutter cutter{nullptr};
    cut(cutter);
    cutter = Cutter{scratch(cutter.used)};
    cut(cutter);
  }

  void cut(Cutter& cutter) {
    query_space = cutter.take<Item>(row_operand_items<Path>(num_queries, p.head_dim));
    weights = cutter.take<Item>(num_queries * padded);
    scores = cutter.take<float>(num_queries * padded);
    key_items = cutter.take<Item>(panel_items<Path>(p.head_dim, LUTHIER_VECTORS));
    values = {cutter.take<Item>(DimPanels<Path>::size(keys, p.head_dim)), keys, p.head_dim};
  }

  // The first key and the first value of the task.
  const Scalar* tokens(const void* of_prefix, const void* of_rows) const {
    if (is_prefix)
      return head_of<Scalar>(of_prefix, task.key_head, held.num_prefix, p.head_dim) + task.begin * p.head_dim;
    return head_of<Scalar>(of_rows, own.row * p.num_key_heads + task.key_head, held.capacity, p.head_dim) +
           (own.first_key + task.begin) * p.head_dim;
  }

  // The first of the task's queries, among those of its cache.
  int64_t first_query() const {
    return task.key_head * work.caches[task.cache].num_tokens * work.per_head + task.query;
  }

  // The first of the task's rows of scores.
  int64_t first_scores() const {
    const int64_t heads_before = task.part * p.num_key_heads;
    if (!is_prefix) return own.scores + (heads_before + task.key_head) * num_queries;
    const DecodeCache& cache = work.caches[task.cache];
    return cache.prefix_scores + heads_before * cache.num_tokens * work.per_head + first_query();
  }

  // The keys that a query sees, counted from the task's first.
  RowKeys keys_of(int64_t query) const {
    if (is_prefix) return {0, keys};
    const int64_t to = own.column + query / work.per_head + 1 - own.first_key - task.begin;
    return {0, to < keys ? to : keys};
  }

  void run() const {
    const Scalar* queries =
        static_cast<const Scalar*>(work.queries) + (work.caches[task.cache].queries + first_query()) * p.head_dim;
    const Rows<Path> operand = row_operand<Path>(queries, p.head_dim, num_queries, p.head_dim, query_space);
    score(operand);
    values.pack(tokens(held.prefix_value, held.value), p.head_dim);
    float* statistics = work.statistics + first_scores() * 2;
    for (int64_t q = 0; q < num_queries; ++q) weigh(q, statistics + q * 2);
    values.multiply_by({weights, padded, Path::pair}, 0, steps_for<Path>(keys),
                       work.sums + first_scores() * work.columns, work.columns, num_queries, false);
  }

  // Panel by panel, the last one as narrow as it can be.
  void score(Rows<Path> queries) const {
    const Scalar* rows = tokens(held.prefix_key, held.key);
    for (int64_t key = 0; key < keys; key += P) {
      const int64_t columns = keys - key < P ? keys - key : P;
      const int vectors = vectors_for(columns);
      pack_rows<Path>(rows + key * p.head_dim, p.head_dim, p.head_dim, columns, vectors, key_items);
      multiply<Path>(queries, key_items, vectors, steps_for<Path>(p.head_dim), scores + key, padded, num_queries,
                     false);
    }
  }

  void weigh(int64_t query, float* statistics) const {
    const RowKeys seen_keys = keys_of(query);
    if (seen_keys.from < seen_keys.to)
      return softmax_row<Path>(p, scores + query * padded, padded, seen_keys, weights + query * padded, statistics);
    // A part of which this query sees nothing: it counts for nothing.
    statistics[0] = -__builtin_inff();
    statistics[1] = 0;
    std::memset(weights + query * padded, 0, padded * sizeof(Item));
  }
};

template <class Path>
void decode_attend_of(const DecodeWork& work, const DecodeTask& task) {
  [[maybe_unused]] const typename Path::Session session{};
  DecodePart<Path>(work, task).run();
}

// The parts of one query: rows of scores, the prefix's and then its own.
struct DecodeParts {
  const DecodeCache& cache;
  int64_t prefix_first, prefix_stride, own_first, own_stride, num_own;

  int64_t count() const { return cache.num_parts + num_own; }
  int64_t scores(int64_t part) const {
    return part < cache.num_parts ? prefix_first + part * prefix_stride
                                  : own_first + (part - cache.num_parts) * own_stride;
  }
};

// out = sum of e^(greatest of part - greatest of all) * sums of part, divided by what the exponentials sum up to.
template <class Scalar>
void merge_parts(const DecodeWork& work, const DecodeParts& parts, Scalar* out) {
  const int64_t head_dim = work.problem.head_dim;
  float greatest = -__builtin_inff();
  for (int64_t i = 0; i < parts.count(); ++i) {
    const float top = work.statistics[parts.scores(i) * 2];
    // A NaN compares false: it has to be carried over by itself.
    greatest = top > greatest || top != top ? top : greatest;
  }
  const auto factor = [&](int64_t i) {
    const float* statistics = work.statistics + parts.scores(i) * 2;
    return statistics[1] == 0 ? 0.0f : exp_negative(Vec{} + (statistics[0] - greatest))[0];
  };
  float total = 0;
  for (int64_t i = 0; i < parts.count(); ++i) total += factor(i) * work.statistics[parts.scores(i) * 2 + 1];
  for (int64_t d = 0; d < head_dim; d += L) {
    Vec sum = {};
    for (int64_t i = 0; i < parts.count(); ++i) sum += load(work.sums + parts.scores(i) * work.columns + d) * factor(i);
    store_some(out + d, sum / total, head_dim - d);
  }
}

template <class Scalar>
void decode_merge_of(const DecodeWork& work, const DecodeBlock& own) {
  const AttentionDecode& p = work.problem;
  const DecodeCache& cache = work.caches[own.cache];
  const int64_t of_head = own.num_tokens * work.per_head, of_cache = cache.num_tokens * work.per_head;
  const int64_t before = (own.token - cache.first_token) * work.per_head;
  for (int64_t head = 0; head < p.num_heads; ++head)
    for (int64_t i = 0; i < own.num_tokens; ++i) {
      const int64_t key_head = head / work.per_head, query = i * work.per_head + head % work.per_head;
      const DecodeParts parts{cache,
                              cache.prefix_scores + key_head * of_cache + before + query,
                              p.num_key_heads * of_cache,
                              own.scores + key_head * of_head + query,
                              p.num_key_heads * of_head,
                              own.num_parts};
      merge_parts<Scalar>(work, parts,
                          static_cast<Scalar*>(p.out) + ((own.token + i) * p.num_heads + head) * p.head_dim);
    }
}

}  // namespace
}  // namespace luthier::detail
