#include "luthier/program.hpp"

#include <stdexcept>

namespace luthier {
namespace {

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

  void operator()(const AttendStep& step) const {
    if (step.layer >= static_cast<int64_t>(run.layers.size()))
      throw std::invalid_argument("a run needs caches for every layer of its program");
    const auto& caches = run.layers[step.layer];
    AttentionDecode problem = step.attention;
    problem.caches = caches.data();
    problem.num_caches = static_cast<int64_t>(caches.size());
    problem.first = run.first.data();
    problem.num_new = 1;
    if (step.turns) {
      problem.cos = run.cos;
      problem.sin = run.sin;
      problem.rotary_dim = run.rotary_dim;
    }
    attention_decode(problem, isa, num_threads);
  }
};

}  // namespace

void run_program(const std::vector<Step>& steps, const ProgramRun& run, Isa isa, int num_threads) {
  const Runner runner{run, isa, num_threads};
  for (const Step& step : steps) std::visit(runner, step);
}

}  // namespace luthier
