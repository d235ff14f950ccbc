// The loss of a linear head: scores, softmax and the sum of the head's rows that it weights, in one pass over the head.
#pragma once
#include "linear_cross_entropy.hpp"
#include "matrix.inl"

namespace luthier::detail {
namespace {

constexpr int64_t kVocabChunk = 256;

// A row's sums when its greatest score has changed: exponentials by `factor`, and what they are multiplied with in the
// second sum of the entropy, (score - greatest), by `fall`.
void scale_row(const LinearCrossEntropy& p, float* row, float factor, float fall) {
  const int64_t wide = (p.dim + P - 1) / P * P;
  for (int64_t d = 0; d < wide; d += L) {
    const Vec first = load(row + d);
    if (p.grad_entropy) store(row + wide + d, (load(row + wide + d) + first * fall) * factor);
    store(row + d, first * factor);
  }
}

// What one more part of the vocabulary contributes to a row is added to `all` and to `to`, its sums.
void merge_loss(const LinearCrossEntropy& p, const RowState& part, const float* from, RowState& all, float* to) {
  const bool rises = part.greatest > all.greatest || part.greatest != part.greatest;
  const float greatest = rises ? part.greatest : all.greatest;
  const float old_share = __builtin_expf(all.greatest - greatest), share = __builtin_expf(part.greatest - greatest);
  const float fall = all.sum > 0 ? all.greatest - greatest : 0.0f,
              part_fall = part.sum > 0 ? part.greatest - greatest : 0.0f;
  const float total = p.entropy ? (all.total + fall * all.sum) * old_share + (part.total + part_fall * part.sum) * share
                                : all.total + part.total;
  all = {greatest, all.sum * old_share + part.sum * share, total, all.target_score + part.target_score,
         all.target_slope + part.target_slope};
  if (!to) return;
  const int64_t wide = (p.dim + P - 1) / P * P;
  scale_row(p, to, old_share, fall);
  for (int64_t d = 0; d < wide; d += L) {
    const Vec first = load(from + d) * share;
    store(to + d, load(to + d) + first);
    if (p.grad_entropy) store(to + wide + d, load(to + wide + d) + load(from + wide + d) * share + first * part_fall);
    if (p.label_smoothing > 0) store(to + wide + d, load(to + wide + d) + load(from + wide + d));
  }
}

template <class Path>
struct LossPass {
  typedef typename Path::Scalar Scalar;
  typedef typename Path::Item Item;
  const LinearCrossEntropy& p;
  const LossTask& task;
  int64_t num_rows;
  Item *hidden, *panel, *weights, *second_weights;
  float *scores, *sums;
  RowState* states;

  LossPass(const LinearCrossEntropy& problem, const LossTask& t) : p(problem), task(t), num_rows(t.last - t.first) {
    Cutter cutter{nullptr};
    cut(cutter);
    cutter = Cutter{scratch(cutter.used)};
    cut(cutter);
    for (int64_t r = 0; r < num_rows; ++r) gather(p.rows[task.first + r], hidden + r * hidden_items());
  }

  bool smoothed() const { return p.label_smoothing > 0; }
  bool twofold() const { return has_second_sum(p); }
  int64_t hidden_items() const { return (p.dim + Path::pair + L - 1) / L * L; }

  void cut(Cutter& cutter) {
    const int64_t contracted = p.dim > kVocabChunk ? p.dim : kVocabChunk;
    hidden = cutter.take<Item>(num_rows * hidden_items());
    panel = cutter.take<Item>(panel_items<Path>(contracted, LUTHIER_VECTORS));
    weights = cutter.take<Item>(num_rows * kVocabChunk);
    second_weights = cutter.take<Item>(twofold() ? num_rows * kVocabChunk : 0);
    scores = cutter.take<float>(num_rows * kVocabChunk);
    sums = cutter.take<float>(task.sums ? num_rows * task.sums_stride : 0);
    states = cutter.take<RowState>(num_rows);
  }

  void gather(int64_t row, Item* out) const {
    const Scalar* from = static_cast<const Scalar*>(p.hidden) + row * p.hidden_stride;
    for (int64_t k = 0; k < hidden_items(); k += L)
      Path::store_row(out + k, k < p.dim ? load_some(from + k, p.dim - k) : Vec{});
  }

  // The scores of vocabulary [v, v + count) into `scores`.
  void score(int64_t v, int64_t count) const {
    const Scalar* head = static_cast<const Scalar*>(p.weight) + v * p.weight_stride;
    for (int64_t c = 0; c < count; c += P) {
      const int64_t columns = count - c < P ? count - c : P;
      pack_rows<Path>(head + c * p.weight_stride, p.weight_stride, p.dim, columns, LUTHIER_VECTORS, panel);
      multiply<Path>({hidden, hidden_items(), Path::pair}, panel, LUTHIER_VECTORS, steps_for<Path>(p.dim), scores + c,
                     kVocabChunk, num_rows, false);
    }
  }

  // One row's scores -> what the head's rows are weighted with; its running maximum and sums move on.
  void extend(int64_t r, int64_t v, int64_t count) const {
    RowState& state = states[r];
    float* row = scores + r * kVocabChunk;
    const int64_t target = p.target[p.rows[task.first + r]] - v;
    const bool hit = target >= 0 && target < count;
    Vec top = Vec{} + state.greatest, plain = {};
    for (int64_t c = 0; c < count; c += L) {
      Vec value = load(row + c);
      if (p.softcap > 0) value = tanh_of(value / p.softcap) * p.softcap;
      if (smoothed()) plain += count - c < L ? load_some_of(value, count - c) : value;
      for (int64_t lane = count - c; lane < L; ++lane) value[lane] = -__builtin_inff();
      top = select((value > top) | (value != value), value, top);
      store(row + c, value);
    }
    const float greatest = max_lanes(top);
    const float old_share = state.greatest == greatest ? 1.0f : __builtin_expf(state.greatest - greatest);
    if (hit) state.target_score = row[target], state.target_slope = slope_at(row[target]);
    Vec sum = {}, product = {};
    for (int64_t c = 0; c < round_to_lanes(count); c += L) {
      const Vec value = load(row + c), weight = exp_negative(value - greatest);
      sum += weight;
      if (p.entropy) product += select(weight == 0.0f, Vec{}, weight * (value - greatest));
      if (task.sums) weigh(r, c, weight, value, count, greatest);
    }
    // The target's share is one minus a number near one: it is added at the end, unrounded.
    if (hit && task.sums) leave_out(r, target);
    const float fall = state.sum > 0 ? state.greatest - greatest : 0.0f;
    if (task.sums && old_share != 1.0f) scale_row(p, sums + r * task.sums_stride, old_share, fall);
    state.total =
        p.entropy ? (state.total + fall * state.sum) * old_share + sum_lanes(product) : state.total + sum_lanes(plain);
    state.sum = state.sum * old_share + sum_lanes(sum);
    state.greatest = greatest;
  }

  void leave_out(int64_t r, int64_t target) const {
    weights[r * kVocabChunk + target] = 0;
    if (p.grad_entropy) second_weights[r * kVocabChunk + target] = 0;
  }

  static Vec load_some_of(Vec value, int64_t count) {
    for (int64_t lane = count; lane < L; ++lane) value[lane] = 0;
    return value;
  }
  static int64_t round_to_lanes(int64_t count) { return (count + L - 1) / L * L; }

  float slope_at(float score) const {
    const float t = p.softcap > 0 ? score / p.softcap : 0;
    return 1 - t * t;
  }

  void weigh(int64_t r, int64_t c, Vec weight, Vec value, int64_t count, float greatest) const {
    Vec slope = Vec{} + 1.0f;
    if (p.softcap > 0) {
      const Vec t = value / p.softcap;
      slope -= t * t;
    }
    // Beyond the vocabulary the weight is zero and the slope no number.
    const Vec changed = p.softcap > 0 ? select(weight == 0.0f, Vec{}, weight * slope) : weight;
    Path::store_row(weights + r * kVocabChunk + c, changed);
    if (p.grad_entropy)
      Path::store_row(second_weights + r * kVocabChunk + c,
                      select(weight == 0.0f, Vec{}, changed * (value - greatest)));
    else if (smoothed())
      Path::store_row(second_weights + r * kVocabChunk + c, count - c < L ? load_some_of(slope, count - c) : slope);
  }

  int64_t wide() const { return (p.dim + P - 1) / P * P; }

  void add_rows(int64_t v, int64_t count) const {
    const Scalar* head = static_cast<const Scalar*>(p.weight) + v * p.weight_stride;
    for (int64_t d = 0; d < p.dim; d += P) {
      const int64_t columns = p.dim - d < P ? p.dim - d : P;
      const int vectors = vectors_for(columns);
      pack_columns<Path>(head + d, p.weight_stride, count, columns, vectors, panel);
      const int64_t steps = steps_for<Path>(count);
      multiply<Path>({weights, kVocabChunk, Path::pair}, panel, vectors, steps, sums + d, task.sums_stride, num_rows,
                     true);
      if (twofold())
        multiply<Path>({second_weights, kVocabChunk, Path::pair}, panel, vectors, steps, sums + wide() + d,
                       task.sums_stride, num_rows, true);
    }
  }

  void run_segment(int64_t segment) const {
    for (int64_t r = 0; r < num_rows; ++r) states[r] = {-__builtin_inff(), 0, 0, 0, 0};
    if (task.sums) std::memset(sums, 0, num_rows * task.sums_stride * sizeof(float));
    const int64_t begin = segment * kVocabSegment;
    const int64_t end = begin + kVocabSegment < p.vocab ? begin + kVocabSegment : p.vocab;
    for (int64_t v = begin; v < end; v += kVocabChunk) {
      const int64_t count = end - v < kVocabChunk ? end - v : kVocabChunk;
      score(v, count);
      for (int64_t r = 0; r < num_rows; ++r) extend(r, v, count);
      if (task.sums) add_rows(v, count);
    }
  }

  void merge(int64_t r, bool is_first) const {
    float* to = task.sums ? task.sums + r * task.sums_stride : nullptr;
    const float* from = task.sums ? sums + r * task.sums_stride : nullptr;
    if (is_first) {
      task.states[r] = states[r];
      if (to) std::memcpy(to, from, task.sums_stride * sizeof(float));
    } else {
      merge_loss(p, states[r], from, task.states[r], to);
    }
  }

  void run() const {
    for (int64_t segment = task.segment; segment < task.end_segment; ++segment) {
      run_segment(segment);
      for (int64_t r = 0; r < num_rows; ++r) merge(r, segment == task.segment);
    }
  }
};

template <class Path>
void loss_of(const LinearCrossEntropy& problem, const LossTask& task) {
  [[maybe_unused]] const typename Path::Session session{};
  LossPass<Path>(problem, task).run();
}

// Loss and gradient of one row from its merged state; `sums` as in LossTask.
template <class Path>
void finish_loss(const LinearCrossEntropy& p, int64_t row, const RowState& state, const float* sums) {
  typedef typename Path::Scalar Scalar;
  const float smoothing = p.label_smoothing, log_sum = __builtin_logf(state.sum), mean = state.total / state.sum;
  const float lse = state.greatest + log_sum, weight = p.token_weight ? p.token_weight[p.rows[row]] : 1.0f;
  // Not lse - score: where both are large their difference has few digits left.
  const float nll = state.greatest - state.target_score + log_sum;
  const float uniform = smoothing > 0 ? lse - state.total / static_cast<float>(p.vocab) : 0.0f;
  p.loss[row] = weight * ((1 - smoothing) * nll + smoothing * uniform + p.z_loss * lse * lse);
  if (p.entropy) p.entropy[row] = log_sum - mean;
  if (!sums) return;
  const float rise = 1 + 2 * p.z_loss * lse;
  const float target_share = __builtin_expf(state.target_score - state.greatest) / state.sum;
  const float target_factor = state.target_slope * (rise * target_share - (1 - smoothing));
  const float entropy_factor = state.target_slope * target_share * (mean - (state.target_score - state.greatest));
  const Scalar* target = static_cast<const Scalar*>(p.weight) + p.target[p.rows[row]] * p.weight_stride;
  const int64_t wide = (p.dim + P - 1) / P * P;
  for (int64_t d = 0; d < p.dim; d += L) {
    const int64_t rest = p.dim - d;
    const Vec sum = load(sums + d), target_row = load_some(target + d, rest);
    Vec grad = sum * (rise / state.sum) + target_row * target_factor;
    if (smoothing > 0) grad -= load(sums + wide + d) * (smoothing / static_cast<float>(p.vocab));
    store_some(p.grad_hidden + row * p.dim + d, grad * weight, rest);
    if (p.grad_entropy)
      store_some(p.grad_entropy + row * p.dim + d,
                 (sum * mean - load(sums + wide + d)) * (1.0f / state.sum) + target_row * entropy_factor, rest);
  }
}

}  // namespace
}  // namespace luthier::detail
