#pragma once

#include <cstdint>
#include <optional>
#include <variant>
#include <vector>

#include "luthier/attention_decode.hpp"
#include "luthier/elementwise.hpp"
#include "luthier/product.hpp"

namespace luthier {

// The steps of a program. What a problem says of its number of rows is the most that a run may have: those that its
// tensors have.
struct ProductStep {
  Product product;  // of `terms`
  std::vector<Term> terms;
};
struct NormStep {
  RmsNorm norm;
  int64_t rows_of_row;  // norm rows that each row of a run has: its heads
};
struct GateStep {
  Gated gated;
};
struct RoundStep {
  std::vector<Rounding> problems;
  Dtype dtype;
};
// Over the caches of the run's layer of that number; its problem has neither caches nor angles.
struct AttendStep {
  AttentionDecode attention;
  int64_t layer;
  bool turns;  // by the run's angles
};
using Step = std::variant<ProductStep, NormStep, GateStep, RoundStep, AttendStep>;

// Cosines and sines of the token of each row, [num_rows][rotary_dim], dense.
struct Angles {
  const void *cos, *sin;
  int64_t num_rows, rotary_dim;
  Dtype dtype;
};

// What a run is about: rows, each a new token, the caches of each layer that these are put into, the first column of
// each row of the caches, and the angles of each token.
struct ProgramRun {
  int64_t num_rows;
  std::vector<std::vector<CachedRows>> layers;
  std::vector<int64_t> first;
  Angles angles;
};

// Steps that are told once and run in their order, many times. Addresses are taken as they are; all else is checked.
class Program {
 public:
  // Throws std::invalid_argument for a step with a missing address, a size that is none or a stride within a row, and
  // for one of another type than those before it.
  void add(Step step);

  // Throws std::invalid_argument, before anything is read or written, where there are more rows than a step's tensors
  // have, or caches, first keys or angles do not fit a step.
  void run(const ProgramRun& run, Isa isa, int num_threads) const;

 private:
  std::vector<Step> steps_;
  std::optional<Dtype> dtype_;
  int64_t most_rows_ = INT64_MAX;
};

}  // namespace luthier
