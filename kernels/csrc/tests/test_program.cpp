// Programs: the bits of their operators by themselves, no row beyond those of a run, and refusals before anything is
// written.
#include "luthier/program.hpp"

#include <functional>
#include <stdexcept>
#include <string>

#include "oracle.hpp"

namespace {

constexpr int64_t kMost = 5, kHeads = 2, kKeyHeads = 1, kSize = 6, kWidth = kHeads * kSize, kRank = 3, kHeld = 4;

template <class Scalar>
struct Tensors {
  std::vector<Scalar> x, weight, norm, low, normed, query, gated, attended, key_cache, value_cache, cos, sin;
  std::vector<float> factor, inverse;
  std::vector<Scalar> rounded;

  Tensors() : inverse(kMost * kHeads) {
    std::mt19937 random(5);
    const auto drawn = [&](int64_t count) { return random_values<Scalar>(count, 0.5f, random); };
    x = drawn(kMost * kWidth), weight = drawn(kWidth * kRank), norm = drawn(kSize);
    key_cache = drawn(kMost * kKeyHeads * (kHeld + 1) * kSize), value_cache = drawn(key_cache.size());
    cos = drawn(kMost * kSize), sin = drawn(kMost * kSize);
    factor = random_values<float>(kRank * kWidth, 0.5f, random);
    rounded.resize(kRank * kWidth), low.resize(kMost * kRank);
    for (auto* one : {&normed, &query, &gated, &attended}) one->resize(kMost * kWidth);
  }

  luthier::RoundStep rounding() {
    return {{{factor.data(), rounded.data(), kRank * kWidth, 0.5f}}, dtype_of<Scalar>()};
  }

  luthier::NormStep norming() {
    return {{x.data(), norm.data(), normed.data(), inverse.data(), kMost * kHeads, kSize, kSize, kSize, 1e-5f, 1.0f,
             dtype_of<Scalar>()},
            kHeads};
  }

  luthier::ProductStep product(const std::vector<Scalar>& in, int64_t contracted, const std::vector<Scalar>& matrix,
                               int64_t columns, std::vector<Scalar>& out, const Scalar* addend = nullptr) {
    return {{nullptr, 0, kMost, columns, nullptr, addend, columns, out.data(), columns, dtype_of<Scalar>()},
            {{in.data(), contracted, matrix.data(), contracted, contracted, true}}};
  }

  luthier::GateStep gating() {
    return {{query.data(), normed.data(), nullptr, gated.data(), nullptr, nullptr, kMost, kWidth, kWidth, kWidth, 0,
             luthier::Activation::silu, dtype_of<Scalar>()}};
  }

  luthier::AttendStep attending() {
    const luthier::Heads key{gated.data(), kWidth, kSize}, value{normed.data(), kWidth, kSize};
    return {{{query.data(), kWidth, kSize},
             key,
             value,
             attended.data(),
             nullptr,
             nullptr,
             nullptr,
             nullptr,
             0,
             0,
             kMost,
             kHeads,
             kKeyHeads,
             kSize,
             0,
             0.4f,
             0.0f,
             dtype_of<Scalar>()},
            0,
            true};
  }

  luthier::ProgramRun run(int64_t rows) {
    const luthier::CachedRows cache{
        key_cache.data(),  value_cache.data(), nullptr, nullptr, rows, kHeld + 1, kHeld, 1, 0, kKeyHeads, kSize,
        dtype_of<Scalar>()};
    return {rows, {{cache}}, std::vector<int64_t>(rows, 1), {cos.data(), sin.data(), rows, kSize, dtype_of<Scalar>()}};
  }

  luthier::Program program() {
    luthier::Program all;
    all.add(rounding());
    all.add(norming());
    all.add(product(normed, kWidth, rounded, kRank, low));
    all.add(product(low, kRank, weight, kWidth, query, x.data()));
    all.add(gating());
    all.add(attending());
    return all;
  }

  void alone(int64_t rows, luthier::Isa isa, int threads) {
    luthier::round_to(rounding().problems.data(), 1, dtype_of<Scalar>(), isa, threads);
    auto norm_problem = norming().norm;
    norm_problem.num_rows = rows * kHeads;
    luthier::rms_norm(norm_problem, isa, threads);
    for (auto step :
         {product(normed, kWidth, rounded, kRank, low), product(low, kRank, weight, kWidth, query, x.data())}) {
      step.product.terms = step.terms.data();
      step.product.num_terms = 1;
      step.product.num_rows = rows;
      luthier::product(step.product, isa, threads);
    }
    auto gate = gating().gated;
    gate.num_rows = rows;
    luthier::gated(gate, isa, threads);
    auto given = run(rows);
    auto attention = attending().attention;
    attention.caches = given.layers[0].data();
    attention.num_caches = 1;
    attention.num_rows = rows;
    attention.first = given.first.data();
    attention.cos = cos.data(), attention.sin = sin.data(), attention.rotary_dim = kSize;
    luthier::attention_decode(attention, isa, threads);
  }
};

bool refuses(const std::function<void()>& call, const std::string& words) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    if (std::string(error.what()).find(words) != std::string::npos) return true;
    std::fprintf(stderr, "refused otherwise: %s\n", error.what());
  }
  return false;
}

template <class Scalar>
void check_runs(luthier::Isa isa, int threads) {
  for (int64_t rows : {int64_t{1}, int64_t{3}, kMost}) {
    Tensors<Scalar> together, apart;
    together.program().run(together.run(rows), isa, threads);
    apart.alone(rows, isa, 1);
    REQUIRE(together.attended == apart.attended);
    REQUIRE(together.query == apart.query);
    REQUIRE(together.key_cache == apart.key_cache && together.value_cache == apart.value_cache);
    for (int64_t i = rows * kWidth; i < kMost * kWidth; ++i) REQUIRE(widen(together.attended[i]) == 0);
  }
}

template <class Scalar>
void check_refused_runs(luthier::Isa isa, int threads) {
  using Change = std::function<void(luthier::ProgramRun&)>;
  using luthier::ProgramRun;
  const std::pair<Change, const char*> changes[] = {
      {[](ProgramRun& run) { run.num_rows = kMost + 1; }, "at most 5 rows, got 6"},
      {[](ProgramRun& run) { run.num_rows = -1; }, "at most 5 rows, got -1"},
      {[](ProgramRun& run) { run.first.pop_back(); }, "must hold 2 rows, got 3"},
      {[](ProgramRun& run) { run.first[1] = kHeld + 1; }, "new tokens of caches must be 3, got 2"},
      {[](ProgramRun& run) { run.first[1] = -1; }, "not be negative, got -1"},
      {[](ProgramRun& run) { run.layers.clear(); }, "got none of layer 0"},
      {[](ProgramRun& run) { run.layers[0].clear(); }, "must hold 3 rows, got 0"},
      {[](ProgramRun& run) { run.layers[0][0].num_held -= 1, run.layers[0][0].num_new += 1; },
       "tokens must be at least 6"},
      {[](ProgramRun& run) { run.layers[0][0].num_new = 0; }, "room for 0 new tokens"},
      {[](ProgramRun& run) { run.layers[0][0].num_rows = 4; }, "must hold 3 rows, got 4"},
      {[](ProgramRun& run) { run.layers[0][0].num_rows = -3; }, "a cache must hold"},
      {[](ProgramRun& run) { run.layers[0][0].num_held = kHeld + 1; },
       "room for 1 new tokens after 5, got a capacity of 5"},
      {[](ProgramRun& run) { run.layers[0][0].num_held = -1; }, "new tokens after -1"},
      {[](ProgramRun& run) { run.layers[0][0].num_key_heads = 2; }, "[B, 1, C, 6], got"},
      {[](ProgramRun& run) { run.layers[0][0].head_dim = 8; }, "[B, 1, C, 6], got"},
      {[](ProgramRun& run) { run.layers[0][0].num_prefix = 1; }, "an address of a cache is missing"},
      {[](ProgramRun& run) { run.layers[0][0].num_prefix = -1; }, "behind -1 tokens"},
      {[](ProgramRun& run) { run.layers[0][0].value = nullptr; }, "an address of a cache is missing"},
      {[](ProgramRun& run) {
         auto& dtype = run.layers[0][0].dtype;
         dtype = dtype == luthier::Dtype::float32 ? luthier::Dtype::bfloat16 : luthier::Dtype::float32;
       },
       "[B, 1, C, 6], got"},
      {[](ProgramRun& run) { run.angles.num_rows = 2; }, "[3, R], R even and at most 6, got"},
      {[](ProgramRun& run) { run.angles.rotary_dim = 8; }, "got"},
      {[](ProgramRun& run) { run.angles.rotary_dim = 5; }, "R even"},
      {[](ProgramRun& run) { run.angles.sin = nullptr; }, "angles must be"},
  };
  Tensors<Scalar> tensors;
  const Tensors<Scalar> before = tensors;
  const luthier::Program program = tensors.program();
  for (const auto& [change, words] : changes) {
    auto given = tensors.run(3);
    change(given);
    REQUIRE(refuses([&] { program.run(given, isa, threads); }, words));
  }
  REQUIRE(tensors.rounded == before.rounded && tensors.normed == before.normed && tensors.low == before.low);
  REQUIRE(tensors.attended == before.attended && tensors.key_cache == before.key_cache);
  program.run(tensors.run(0), isa, threads);
  REQUIRE(tensors.rounded == before.rounded);
}

template <class Scalar>
void check_refused_steps() {
  Tensors<Scalar> tensors;
  const auto refused = [&](luthier::Step step, const char* words) {
    luthier::Program program;
    return refuses([&] { program.add(std::move(step)); }, words);
  };
  auto product = tensors.product(tensors.normed, kWidth, tensors.rounded, kRank, tensors.low);
  auto step = product;
  step.product.out = nullptr;
  REQUIRE(refused(step, "an address of its own type to write to"));
  step = product, step.terms.clear();
  REQUIRE(refused(step, "needs terms"));
  step = product, step.terms[0].matrix = nullptr;
  REQUIRE(refused(step, "a term of a product lacks an address"));
  step = product, step.terms[0].rows_stride = kWidth - 1;
  REQUIRE(refused(step, "must be apart"));
  step = product, step.terms[0].contracted = 0;
  REQUIRE(refused(step, "at least 1 column"));
  step = product, step.product.out_stride = kRank - 1;
  REQUIRE(refused(step, "result and of its addend must be apart"));
  step = product, step.product.num_rows = 0;
  REQUIRE(refused(step, "at least 1 row"));
  auto norm = tensors.norming();
  norm.norm.inverse = nullptr;
  REQUIRE(refused(norm, "a norm lacks an address"));
  norm = tensors.norming(), norm.rows_of_row = 0;
  REQUIRE(refused(norm, "at least 1 for each row"));
  auto gate = tensors.gating();
  gate.gated.up = nullptr;
  REQUIRE(refused(gate, "addresses of both inputs"));
  auto rounding = tensors.rounding();
  rounding.problems[0].to = nullptr;
  REQUIRE(refused(rounding, "what is rounded lacks an address"));
  auto attending = tensors.attending();
  attending.attention.num_key_heads = 0;
  REQUIRE(refused(attending, "a multiple of those of keys"));
  attending = tensors.attending(), attending.layer = -1;
  REQUIRE(refused(attending, "from 0 on"));
  luthier::Program program;
  program.add(product);
  auto other = tensors.rounding();
  other.dtype = other.dtype == luthier::Dtype::float32 ? luthier::Dtype::bfloat16 : luthier::Dtype::float32;
  REQUIRE(refuses([&] { program.add(other); }, "must be of one type"));
}

}  // namespace

int check_program(luthier::Isa isa, int threads) {
  check_runs<float>(isa, threads);
  check_runs<uint16_t>(isa, threads);
  check_refused_runs<float>(isa, threads);
  check_refused_runs<uint16_t>(isa, threads);
  check_refused_steps<float>();
  check_refused_steps<uint16_t>();
  return 6;
}
