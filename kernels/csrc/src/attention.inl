// Attention of packed sequences, forward and backward. A block of queries holds the scores of all the keys that it
// sees: softmax then needs no rescaling, and each row's sums run over the keys from the start of its sequence.
#pragma once
#include "attention.hpp"
#include "matrix.inl"

namespace luthier::detail {
namespace {

template <class Scalar>
Scalar* at(const Heads& heads, int64_t token, int64_t head) {
  return static_cast<Scalar*>(heads.elements) + token * heads.token_stride + head * heads.head_stride;
}

int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Queries of a block: fewer where there are many keys, so that their scores stay in the second cache.
int64_t block_queries(int64_t num_keys) { return num_keys <= 1024 ? 48 : num_keys <= 4096 ? 24 : 12; }

// The keys that queries [first, last) of a sequence see, in whole panels counted from its start.
struct KeySpan {
  int64_t start, end;
  int64_t padded() const { return round_up(end - start, P); }
};

KeySpan keys_seen(int64_t first, int64_t last, int64_t window) {
  const int64_t from = window > 0 && first - window + 1 > 0 ? first - window + 1 : 0;
  return {from / P * P, last};
}

// The keys of one row: [from, to), relative to the start of `span`.
struct RowKeys {
  int64_t from, to;
};

RowKeys keys_of_row(int64_t query, const KeySpan& span, int64_t window) {
  const int64_t from = window > 0 && query - window + 1 > span.start ? query - window + 1 : span.start;
  return {from - span.start, query + 1 - span.start};
}

// Lanes whose key number, counted from `key`, lies in `keys`.
IntVec seen(int64_t key, const RowKeys& keys) {
  IntVec index;
  for (int i = 0; i < L; ++i) index[i] = i;
  return (index >= static_cast<int32_t>(keys.from - key)) & (index < static_cast<int32_t>(keys.to - key));
}

template <class Problem>
Vec scored(Vec dots, const Problem& p) {
  const Vec score = dots * p.scale;
  return p.softcap > 0 ? tanh_of(score / p.softcap) * p.softcap : score;
}

// Packs a [keys][head_dim] operand whose rows are contracted, or (transposed) whose rows are columns of the product:
// panel by panel of P lanes. Items of one panel are `stride` apart.
template <class Path>
struct KeyPanels {
  typename Path::Item* items;
  int64_t stride;
  const typename Path::Item* panel(int64_t i) const { return items + i * stride; }
};

template <class Path>
KeyPanels<Path> keys_as_columns(const typename Path::Scalar* rows, int64_t row_stride, int64_t keys, int64_t head_dim,
                                typename Path::Item* out) {
  const int64_t stride = panel_items<Path>(head_dim, LUTHIER_VECTORS);
  for (int64_t key = 0; key < keys; key += P)
    pack_rows<Path>(rows + key * row_stride, row_stride, head_dim, keys - key < P ? keys - key : P, LUTHIER_VECTORS,
                    out + key / P * stride);
  return {out, stride};
}

// A product with [contracted][head_dim]: its columns in panels, the last one as narrow as it can be.
template <class Path>
struct DimPanels {
  typename Path::Item* items;
  int64_t contracted, head_dim;

  static int64_t size(int64_t contracted, int64_t head_dim) {
    return panel_items<Path>(contracted, LUTHIER_VECTORS) * ((head_dim + P - 1) / P);
  }
  void pack(const typename Path::Scalar* rows, int64_t row_stride) const {
    for (int64_t d = 0; d < head_dim; d += P)
      pack_columns<Path>(rows + d, row_stride, contracted, width(d), vectors_for(width(d)), panel(d));
  }
  int64_t width(int64_t d) const { return head_dim - d < P ? head_dim - d : P; }
  typename Path::Item* panel(int64_t d) const {
    return items + panel_items<Path>(contracted, LUTHIER_VECTORS) * (d / P);
  }
  // c[rows][c_stride] (+)= a times steps [step, step + steps) of this operand.
  void multiply_by(Rows<Path> a, int64_t step, int64_t steps, float* c, int64_t c_stride, int64_t rows,
                   bool accumulate) const {
    for (int64_t d = 0; d < head_dim; d += P) {
      const int vectors = vectors_for(width(d));
      multiply<Path>(a, panel(d) + step * vectors * L * Path::pair, vectors, steps, c + d, c_stride, rows, accumulate);
    }
  }
};

// scores[rows][span.padded()] = rows times the keys of the span.
template <class Path>
void dots(Rows<Path> rows, const KeyPanels<Path>& keys, const KeySpan& span, int64_t first_panel, int64_t head_dim,
          int64_t num_rows, float* scores) {
  for (int64_t key = 0; key < span.padded(); key += P)
    multiply<Path>(rows, keys.panel(first_panel + key / P), LUTHIER_VECTORS, steps_for<Path>(head_dim), scores + key,
                   span.padded(), num_rows, false);
}

// Scores of a row in place -> exponentials of (score - greatest), as items; returns the greatest and their sum.
template <class Path, class Problem>
void softmax_row(const Problem& p, float* row, int64_t padded, const RowKeys& keys, typename Path::Item* out,
                 float* statistics) {
  Vec top = Vec{} - __builtin_inff();
  for (int64_t key = 0; key < padded; key += L) {
    const Vec score = select(seen(key, keys), scored(load(row + key), p), Vec{} - __builtin_inff());
    top = (Vec)select(score > top, score, top);
    // A NaN compares false: it has to be carried over by itself.
    top = select(score != score, score, top);
    store(row + key, score);
  }
  const float greatest = max_lanes(top);
  Vec total = {};
  for (int64_t key = 0; key < padded; key += L) {
    const Vec weight = exp_negative(load(row + key) - greatest);
    total += weight;
    Path::store_row(out + key, weight);
  }
  statistics[0] = greatest;
  statistics[1] = sum_lanes(total);
}

template <class Path>
struct AttentionForward {
  typedef typename Path::Scalar Scalar;
  typedef typename Path::Item Item;
  const Attention& p;
  const AttentionTask& task;
  KeySpan all;
  int64_t block, head_dim;
  Item *query_space, *weights, *key_items;
  float *scores, *sums;
  DimPanels<Path> values;
  KeyPanels<Path> keys;

  AttentionForward(const Attention& problem, const AttentionTask& t)
      : p(problem), task(t), all(keys_seen(t.first - t.begin, t.last - t.begin, problem.window)) {
    head_dim = p.head_dim;
    block = block_queries(all.padded());
    Cutter cutter{nullptr};
    cut(cutter);
    cutter = Cutter{scratch(cutter.used)};
    cut(cutter);
    const int64_t token = t.begin + all.start, count = all.end - all.start;
    keys = keys_as_columns<Path>(at<Scalar>(p.key, token, t.key_head), p.key.token_stride, count, head_dim, key_items);
    values.pack(at<Scalar>(p.value, token, t.key_head), p.value.token_stride);
  }

  void cut(Cutter& cutter) {
    query_space = cutter.take<Item>(row_operand_items<Path>(block, head_dim));
    weights = cutter.take<Item>(block * all.padded());
    scores = cutter.take<float>(block * all.padded());
    sums = cutter.take<float>(block * round_up(head_dim, P));
    key_items = cutter.take<Item>(panel_items<Path>(head_dim, LUTHIER_VECTORS) * (all.padded() / P));
    const int64_t contracted = all.end - all.start;
    values = {cutter.take<Item>(DimPanels<Path>::size(contracted, head_dim)), contracted, head_dim};
  }

  // Queries [first, last), counted from the start of the sequence.
  void compute(int64_t head, int64_t first, int64_t last) const {
    const int64_t rows = last - first, out_stride = round_up(head_dim, P), token = task.begin + first;
    const KeySpan span = keys_seen(first, last, p.window);
    const Rows<Path> queries =
        row_operand<Path>(at<Scalar>(p.query, token, head), p.query.token_stride, rows, head_dim, query_space);
    dots<Path>(queries, keys, span, (span.start - all.start) / P, head_dim, rows, scores);
    const int64_t num_tokens = p.bounds[p.num_sequences];
    float* statistics = p.statistics + (head * num_tokens + token) * 2;
    for (int64_t r = 0; r < rows; ++r)
      softmax_row<Path>(p, scores + r * span.padded(), span.padded(), keys_of_row(first + r, span, p.window),
                        weights + r * span.padded(), statistics + r * 2);
    values.multiply_by({weights, span.padded(), Path::pair}, (span.start - all.start) / Path::pair,
                       steps_for<Path>(span.end - span.start), sums, out_stride, rows, false);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < head_dim; d += L)
        store_some(at<Scalar>(p.out, token + r, head) + d, load(sums + r * out_stride + d) / statistics[r * 2 + 1],
                   head_dim - d);
  }

  void run() const {
    const int64_t group = p.num_heads / p.num_key_heads, end = task.last - task.begin;
    for (int64_t first = task.first - task.begin; first < end; first += block)
      for (int64_t head = task.key_head * group; head < (task.key_head + 1) * group; ++head)
        compute(head, first, first + block < end ? first + block : end);
  }
};

template <class Path>
void attention_of(const Attention& problem, const AttentionTask& task) {
  [[maybe_unused]] const typename Path::Session session{};
  AttentionForward<Path>(problem, task).run();
}

}  // namespace
}  // namespace luthier::detail
