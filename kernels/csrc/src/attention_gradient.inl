// The gradients of packed attention (FlashAttention's formulas, arXiv:2205.14135, appendix B.4), over whole sequences:
// a task owns the keys of one head, so that no sum is divided among threads.
#pragma once
#include "attention.inl"

namespace luthier::detail {
namespace {

// d score / d (scale * q.k), times scale.
Vec slope(Vec score, const Attention& p) {
  if (p.softcap <= 0) return Vec{} + p.scale;
  const Vec t = score / p.softcap;
  return (1.0f - t * t) * p.scale;
}

template <class Path>
struct AttentionBackward {
  typedef typename Path::Scalar Scalar;
  typedef typename Path::Item Item;
  const AttentionGradient& g;
  const Attention& p;
  const AttentionTask& task;
  int64_t length, padded, block, head_dim, wide;
  Item *query_space, *grad_space, *score_grad_rows, *weight_steps, *score_grad_steps, *key_items, *value_items;
  float *scores, *weight_grads, *sums, *key_sums, *value_sums;
  DimPanels<Path> key_rows, query_rows, grad_rows;
  KeyPanels<Path> keys, values;

  AttentionBackward(const AttentionGradient& problem, const AttentionTask& t)
      : g(problem), p(problem.forward), task(t) {
    length = t.last - t.begin;
    padded = round_up(length, P);
    block = block_queries(padded);
    head_dim = p.head_dim;
    wide = round_up(head_dim, P);
    Cutter cutter{nullptr};
    cut(cutter);
    cutter = Cutter{scratch(cutter.used)};
    cut(cutter);
    const Scalar* key = at<Scalar>(p.key, t.begin, t.key_head);
    const Scalar* value = at<Scalar>(p.value, t.begin, t.key_head);
    keys = keys_as_columns<Path>(key, p.key.token_stride, length, head_dim, key_items);
    values = keys_as_columns<Path>(value, p.value.token_stride, length, head_dim, value_items);
    key_rows.pack(key, p.key.token_stride);
    std::memset(key_sums, 0, length * wide * sizeof(float));
    std::memset(value_sums, 0, length * wide * sizeof(float));
  }

  void cut(Cutter& cutter) {
    query_space = cutter.take<Item>(row_operand_items<Path>(block, head_dim));
    grad_space = cutter.take<Item>(row_operand_items<Path>(block, head_dim));
    score_grad_rows = cutter.take<Item>(block * padded);
    weight_steps = cutter.take<Item>(block * padded);
    score_grad_steps = cutter.take<Item>(block * padded);
    scores = cutter.take<float>(block * padded);
    weight_grads = cutter.take<float>(block * padded);
    sums = cutter.take<float>(block * wide);
    key_sums = cutter.take<float>(length * wide);
    value_sums = cutter.take<float>(length * wide);
    key_items = cutter.take<Item>(panel_items<Path>(head_dim, LUTHIER_VECTORS) * (padded / P));
    value_items = cutter.take<Item>(panel_items<Path>(head_dim, LUTHIER_VECTORS) * (padded / P));
    key_rows = {cutter.take<Item>(DimPanels<Path>::size(length, head_dim)), length, head_dim};
    query_rows = {cutter.take<Item>(DimPanels<Path>::size(block, head_dim)), block, head_dim};
    grad_rows = {cutter.take<Item>(DimPanels<Path>::size(block, head_dim)), block, head_dim};
  }

  // Sum of out * grad_out of one row: the part of the softmax's gradient that all its scores share.
  float shared_gradient(int64_t token, int64_t head) const {
    const Scalar *out = at<Scalar>(p.out, token, head), *grad = at<Scalar>(g.grad_out, token, head);
    Vec total = {};
    for (int64_t d = 0; d < head_dim; d += L)
      total += load_some(out + d, head_dim - d) * load_some(grad + d, head_dim - d);
    return sum_lanes(total);
  }

  // In place: scores -> weights, weight_grads -> gradients of the dot products.
  void differentiate_row(int64_t row, const KeySpan& span, int64_t first, int64_t head) const {
    const int64_t token = task.begin + first + row, width = span.padded();
    const float* statistics = p.statistics + (head * p.bounds[p.num_sequences] + token) * 2;
    const RowKeys seen_keys = keys_of_row(first + row, span, p.window);
    const float shared = shared_gradient(token, head), greatest = statistics[0], inverse = 1.0f / statistics[1];
    float *score = scores + row * width, *grad = weight_grads + row * width;
    for (int64_t key = 0; key < width; key += L) {
      const Vec value = select(seen(key, seen_keys), scored(load(score + key), p), Vec{} - __builtin_inff());
      const Vec weight = exp_negative(value - greatest) * inverse;
      const Vec change = weight * (load(grad + key) - shared) * slope(value, p);
      // Of a key that is not seen the weight is zero, but its slope or gradient may be no number.
      const Vec kept = select(seen(key, seen_keys), change, Vec{});
      store(score + key, weight);
      store(grad + key, kept);
      Path::store_row(score_grad_rows + row * width + key, kept);
    }
  }

  // The rows' weights and score gradients, interleaved as steps of a contraction over queries.
  void weave(int64_t rows, int64_t width) const {
    for (int64_t r = 0; r < rows; r += Path::pair)
      for (int64_t key = 0; key < width; key += L) {
        const float *weight = scores + r * width + key, *grad = weight_grads + r * width + key;
        const bool two = Path::pair == 2 && r + 1 < rows;
        Path::store_step(weight_steps + r * width + key * Path::pair, load(weight), two ? load(weight + width) : Vec{});
        Path::store_step(score_grad_steps + r * width + key * Path::pair, load(grad), two ? load(grad + width) : Vec{});
      }
  }

  void compute(int64_t head, int64_t first, int64_t last) {
    const int64_t rows = last - first, token = task.begin + first;
    const KeySpan span = keys_seen(first, last, p.window);
    const int64_t width = span.padded(), seen_keys = span.end - span.start;
    const Scalar *query = at<Scalar>(p.query, token, head), *grad = at<Scalar>(g.grad_out, token, head);
    dots<Path>(row_operand<Path>(query, p.query.token_stride, rows, head_dim, query_space), keys, span, span.start / P,
               head_dim, rows, scores);
    dots<Path>(row_operand<Path>(grad, g.grad_out.token_stride, rows, head_dim, grad_space), values, span,
               span.start / P, head_dim, rows, weight_grads);
    for (int64_t r = 0; r < rows; ++r) differentiate_row(r, span, first, head);
    weave(rows, width);
    key_rows.multiply_by({score_grad_rows, width, Path::pair}, span.start / Path::pair, steps_for<Path>(seen_keys),
                         sums, wide, rows, false);
    store_rows(g.grad_query, token, head, sums, rows);
    query_rows.contracted = grad_rows.contracted = rows;
    query_rows.pack(query, p.query.token_stride);
    grad_rows.pack(grad, g.grad_out.token_stride);
    const int64_t steps = steps_for<Path>(rows);
    query_rows.multiply_by({score_grad_steps, Path::pair, width * Path::pair}, 0, steps, key_sums + span.start * wide,
                           wide, seen_keys, true);
    grad_rows.multiply_by({weight_steps, Path::pair, width * Path::pair}, 0, steps, value_sums + span.start * wide,
                          wide, seen_keys, true);
  }

  void store_rows(const Heads& to, int64_t token, int64_t head, const float* from, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < head_dim; d += L)
        store_some(at<Scalar>(to, token + r, head) + d, load(from + r * wide + d), head_dim - d);
  }

  void run() {
    const int64_t group = p.num_heads / p.num_key_heads;
    for (int64_t head = task.key_head * group; head < (task.key_head + 1) * group; ++head)
      for (int64_t first = 0; first < length; first += block)
        compute(head, first, first + block < length ? first + block : length);
    store_rows(g.grad_key, task.begin, task.key_head, key_sums, length);
    store_rows(g.grad_value, task.begin, task.key_head, value_sums, length);
  }
};

template <class Path>
void attention_gradient_of(const AttentionGradient& problem, const AttentionTask& task) {
  [[maybe_unused]] const typename Path::Session session{};
  AttentionBackward<Path>(problem, task).run();
}

}  // namespace
}  // namespace luthier::detail
