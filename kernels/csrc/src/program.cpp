#include "luthier/program.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace luthier {
namespace {

const char* name_of(Dtype dtype) { return dtype == Dtype::bfloat16 ? "bfloat16" : "float32"; }

void require(bool fits, const char* words) {
  if (!fits) throw std::invalid_argument(words);
}

// Rows that are `stride` apart and `size` long do not run into each other.
bool are_apart(int64_t stride, int64_t size, int64_t num_rows) { return num_rows < 2 || stride >= size; }

void require_term(const Term& term, const Product& product) {
  const int64_t columns = std::min(term.num_columns, product.num_columns);
  const int64_t matrix_rows = term.transposed ? columns : term.contracted;
  const Codes& codes = term.quantised;
  const bool has_codes = codes.codes && codes.scales && codes.block > 0;
  require(term.rows && (term.matrix || has_codes), "a term of a product lacks an address");
  require(term.contracted > 0 && columns > 0 && term.first_row >= 0,
          "a term of a product must contract at least 1 column into at least 1, from row 0 on");
  require(are_apart(term.rows_stride, term.contracted, product.num_rows) &&
              are_apart(term.matrix_stride, term.transposed ? term.contracted : columns, matrix_rows),
          "rows of a product's terms must be apart");
}

// What of a step says whether it can run: its type, the most rows, and that nothing is missing.
struct Checker {
  Dtype dtype = Dtype::float32;
  int64_t most_rows = INT64_MAX;

  void operator()(const ProductStep& step) {
    const Product& p = step.product;
    dtype = p.dtype;
    most_rows = p.num_rows;
    require(!step.terms.empty() && p.out && p.num_columns > 0 && !p.float_out,
            "a product of a program needs terms, columns, and an address of its own type to write to");
    require(are_apart(p.out_stride, p.num_columns, p.num_rows) &&
                (!p.addend || are_apart(p.addend_stride, p.num_columns, p.num_rows)),
            "rows of a product's result and of its addend must be apart");
    for (const Term& term : step.terms) require_term(term, p);
  }

  void operator()(const NormStep& step) {
    const RmsNorm& p = step.norm;
    require(step.rows_of_row > 0 && p.dim > 0, "a norm needs rows of at least 1 element, at least 1 for each row");
    require(p.x && p.weight && p.out && p.inverse, "a norm lacks an address");
    require(are_apart(p.x_stride, p.dim, p.num_rows) && are_apart(p.out_stride, p.dim, p.num_rows),
            "rows of a norm must be apart");
    dtype = p.dtype;
    most_rows = p.num_rows / step.rows_of_row;
  }

  void operator()(const GateStep& step) {
    const Gated& p = step.gated;
    require(p.gate && p.up && p.out && !p.grad_out, "a gate needs addresses of both inputs and of its result");
    require(p.dim > 0 && are_apart(p.gate_stride, p.dim, p.num_rows) && are_apart(p.up_stride, p.dim, p.num_rows),
            "rows of a gate must have at least 1 element and be apart");
    dtype = p.dtype;
    most_rows = p.num_rows;
  }

  void operator()(const RoundStep& step) {
    for (const Rounding& one : step.problems)
      require(one.count >= 0 && (one.count == 0 || (one.from && one.to)), "what is rounded lacks an address");
    dtype = step.dtype;
  }

  void operator()(const AttendStep& step) {
    const AttentionDecode& p = step.attention;
    require(step.layer >= 0, "attention of a program is of a layer from 0 on");
    require(p.query.elements && p.new_key.elements && p.new_value.elements && p.out, "attention lacks an address");
    // What is not there yet has no rows, so that sizes of heads alone are looked at.
    require_fitting(p);
    dtype = p.dtype;
    most_rows = p.num_tokens;
  }
};

AttentionDecode problem_of(const AttendStep& step, const ProgramRun& run) {
  if (step.layer >= static_cast<int64_t>(run.layers.size()))
    throw std::invalid_argument("a run needs caches for every layer of its program, got none of layer " +
                                std::to_string(step.layer));
  const auto& caches = run.layers[step.layer];
  AttentionDecode problem = step.attention;
  problem.caches = caches.data();
  problem.num_caches = static_cast<int64_t>(caches.size());
  problem.first = run.first.data();
  problem.num_rows = static_cast<int64_t>(run.first.size());
  if (step.turns) {
    problem.cos = run.angles.cos;
    problem.sin = run.angles.sin;
    problem.rotary_dim = run.angles.rotary_dim;
  }
  return problem;
}

void require_angles(const AttendStep& step, const ProgramRun& run) {
  const Angles& angles = run.angles;
  const int64_t size = step.attention.head_dim;
  const bool is_even = angles.rotary_dim > 0 && angles.rotary_dim % 2 == 0 && angles.rotary_dim <= size;
  if (is_even && angles.cos && angles.sin && angles.num_rows == run.num_rows && angles.dtype == step.attention.dtype)
    return;
  throw std::invalid_argument("angles must be dense " + std::string(name_of(step.attention.dtype)) + " [" +
                              std::to_string(run.num_rows) + ", R], R even and at most " + std::to_string(size) +
                              ", got " + name_of(angles.dtype) + " [" + std::to_string(angles.num_rows) + ", " +
                              std::to_string(angles.rotary_dim) + "]");
}

struct Runner {
  const ProgramRun& run;
  Isa isa;
  int num_threads;

  void operator()(const ProductStep& step) const {
    Product problem = step.product;
    problem.terms = step.terms.data();
    problem.num_terms = static_cast<int>(step.terms.size());
    problem.num_rows = run.num_rows;
    product(problem, isa, num_threads);
  }

  void operator()(const NormStep& step) const {
    RmsNorm problem = step.norm;
    problem.num_rows = run.num_rows * step.rows_of_row;
    rms_norm(problem, isa, num_threads);
  }

  void operator()(const GateStep& step) const {
    Gated problem = step.gated;
    problem.num_rows = run.num_rows;
    gated(problem, isa, num_threads);
  }

  void operator()(const RoundStep& step) const {
    round_to(step.problems.data(), static_cast<int>(step.problems.size()), step.dtype, isa, num_threads);
  }

  void operator()(const AttendStep& step) const { attention_decode(problem_of(step, run), isa, num_threads); }
};

}  // namespace

void Program::add(Step step) {
  Checker checker;
  std::visit(checker, step);
  if (dtype_ && *dtype_ != checker.dtype)
    throw std::invalid_argument("steps of a program must be of one type, got " + std::string(name_of(*dtype_)) +
                                " and " + name_of(checker.dtype));
  if (checker.most_rows < 1) throw std::invalid_argument("tensors of a program must have at least 1 row");
  dtype_ = checker.dtype;
  most_rows_ = std::min(most_rows_, checker.most_rows);
  steps_.push_back(std::move(step));
}

void Program::run(const ProgramRun& run, Isa isa, int num_threads) const {
  if (run.num_rows < 0 || run.num_rows > most_rows_)
    throw std::invalid_argument("a run must have at most " + std::to_string(most_rows_) + " rows, got " +
                                std::to_string(run.num_rows));
  for (const Step& step : steps_)
    if (const auto* attend = std::get_if<AttendStep>(&step)) {
      if (attend->turns) require_angles(*attend, run);
      const AttentionDecode problem = problem_of(*attend, run);
      require_fitting(problem);
      if (tokens_of(problem) != run.num_rows)
        throw std::invalid_argument("new tokens of caches must be " + std::to_string(run.num_rows) + ", got " +
                                    std::to_string(tokens_of(problem)));
    }
  if (run.num_rows == 0) return;
  const Runner runner{run, isa, num_threads};
  for (const Step& step : steps_) std::visit(runner, step);
}

}  // namespace luthier
