#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "luthier/attention_decode.hpp"
#include "luthier/elementwise.hpp"
#include "luthier/product.hpp"

namespace luthier {

// The steps of a program. What a problem says of its number of rows does not count: those of a run do.
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
// Over the caches of the run's layer of that number.
struct AttendStep {
  AttentionDecode attention;
  int64_t layer;
  bool turns;  // by the run's angles
};
using Step = std::variant<ProductStep, NormStep, GateStep, RoundStep, AttendStep>;

// What a run is about: rows, one new token each, the caches of each layer, the first key of its own that each row sees,
// and the angles of its token.
struct ProgramRun {
  int64_t num_rows;
  std::vector<std::vector<CachedRows>> layers;
  std::vector<int64_t> first;
  const void *cos, *sin;  // [num_rows][rotary_dim]
  int64_t rotary_dim;
};

// Runs steps in their order. Throws std::invalid_argument where a layer has no caches in the run.
void run_program(const std::vector<Step>& steps, const ProgramRun& run, Isa isa, int num_threads);

}  // namespace luthier
