// The only file that includes pybind11: it exposes the torch-free kernels as functions over raw pointers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <variant>
#include <vector>

#include "luthier/adamw_8bit.hpp"
#include "luthier/attention.hpp"
#include "luthier/attention_decode.hpp"
#include "luthier/cpuid.hpp"
#include "luthier/dequantise.hpp"
#include "luthier/elementwise.hpp"
#include "luthier/linear_cross_entropy.hpp"
#include "luthier/product.hpp"
#include "luthier/program.hpp"

namespace py = pybind11;

namespace {

luthier::Isa isa_of(const std::string& name) {
  if (name == "plain") return luthier::Isa::plain;
  if (name == "avx2") return luthier::Isa::avx2;
  if (name == "avx512") return luthier::Isa::avx512;
  if (name == "avx512_bf16") return luthier::Isa::avx512_bf16;
  if (name == "amx_bf16") return luthier::Isa::amx_bf16;
  throw std::invalid_argument("isa must be plain, avx2, avx512, avx512_bf16 or amx_bf16, got " + name);
}

luthier::Dtype dtype_of(bool bfloat16) { return bfloat16 ? luthier::Dtype::bfloat16 : luthier::Dtype::float32; }

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, row stride, address, row stride, contracted, transposed)
using TermTuple = std::tuple<uintptr_t, int64_t, uintptr_t, int64_t, int64_t, bool>;
// (addresses of codes, levels or 0, and scales; elements of a block; row length)
using CodesTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t>;
// The same of a quantised matrix.
using QuantisedTuple = std::tuple<uintptr_t, int64_t, CodesTuple, int64_t, bool>;
// The first, and of which rows [first, end) it is a term, and of how many columns.
using PartTuple = std::tuple<TermTuple, int64_t, int64_t, int64_t>;
// (address of left, row stride, address of right, row stride, rows, rank, columns, scale, address of out, transposed)
using GramTuple = std::tuple<uintptr_t, int64_t, uintptr_t, int64_t, int64_t, int64_t, int64_t, float, uintptr_t, bool>;
// (address, token stride, head stride)
using HeadsTuple = std::tuple<uintptr_t, int64_t, int64_t>;

luthier::Heads heads_of(const HeadsTuple& t) { return {at<void>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)}; }

luthier::Term term_of(const TermTuple& tuple) {
  const auto& [rows, rows_stride, matrix, matrix_stride, contracted, transposed] = tuple;
  return {at<void>(rows), rows_stride, at<void>(matrix), matrix_stride, contracted, transposed};
}

luthier::Term term_of(const QuantisedTuple& tuple) {
  const auto& [rows, rows_stride, matrix, contracted, transposed] = tuple;
  const auto& [codes, levels, scales, block, length] = matrix;
  luthier::Term term{at<void>(rows), rows_stride, nullptr, length, contracted, transposed};
  term.quantised = {at<const void>(codes), at<const float>(levels), at<const float>(scales), block};
  return term;
}

using AnyTermTuple = std::variant<TermTuple, QuantisedTuple, PartTuple>;
// (address, row stride)
using RowsTuple = std::pair<uintptr_t, int64_t>;

std::vector<luthier::Term> terms_of(const std::vector<AnyTermTuple>& tuples) {
  std::vector<luthier::Term> terms;
  for (const auto& tuple : tuples) {
    if (const auto* part = std::get_if<PartTuple>(&tuple)) {
      terms.push_back(term_of(std::get<0>(*part)));
      std::tie(std::ignore, terms.back().first_row, terms.back().end_row, terms.back().num_columns) = *part;
    } else if (const auto* quantised = std::get_if<QuantisedTuple>(&tuple)) {
      terms.push_back(term_of(*quantised));
    } else {
      terms.push_back(term_of(std::get<TermTuple>(tuple)));
    }
  }
  return terms;
}

void product(const std::vector<AnyTermTuple>& tuples, int64_t num_rows, int64_t num_columns, uintptr_t bias,
             const RowsTuple& addend, const RowsTuple& out, bool bfloat16, bool float_out, const std::string& isa,
             int num_threads) {
  const std::vector<luthier::Term> terms = terms_of(tuples);
  const luthier::Product problem{terms.data(),
                                 static_cast<int>(terms.size()),
                                 num_rows,
                                 num_columns,
                                 at<const void>(bias),
                                 at<const void>(addend.first),
                                 addend.second,
                                 at<void>(out.first),
                                 out.second,
                                 dtype_of(bfloat16),
                                 float_out};
  const luthier::Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  luthier::product(problem, chosen, num_threads);
}

void gram(const std::vector<GramTuple>& tuples, bool bfloat16, const std::string& isa, int num_threads) {
  std::vector<luthier::Gram> problems;
  for (const auto& [left, left_stride, right, right_stride, num_rows, rank, num_columns, scale, out, transposed] :
       tuples)
    problems.push_back({at<void>(left), left_stride, at<void>(right), right_stride, num_rows, rank, num_columns, scale,
                        at<float>(out), transposed, dtype_of(bfloat16)});
  const luthier::Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  luthier::gram(problems.data(), static_cast<int>(problems.size()), chosen, num_threads);
}

// (address of what is read, of what is written, elements, scale)
using RoundingTuple = std::tuple<uintptr_t, uintptr_t, int64_t, float>;

std::vector<luthier::Rounding> roundings_of(const std::vector<RoundingTuple>& tuples) {
  std::vector<luthier::Rounding> problems;
  for (const auto& [from, to, count, scale] : tuples)
    problems.push_back({at<const float>(from), at<void>(to), count, scale});
  return problems;
}

void round_to(const std::vector<RoundingTuple>& tuples, bool bfloat16, const std::string& isa, int num_threads) {
  const std::vector<luthier::Rounding> problems = roundings_of(tuples);
  const luthier::Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  luthier::round_to(problems.data(), static_cast<int>(problems.size()), dtype_of(bfloat16), chosen, num_threads);
}

luthier::Attention attention_of(const py::dict& p) {
  return {heads_of(p["query"].cast<HeadsTuple>()),
          heads_of(p["key"].cast<HeadsTuple>()),
          heads_of(p["value"].cast<HeadsTuple>()),
          heads_of(p["out"].cast<HeadsTuple>()),
          at<float>(p["statistics"].cast<uintptr_t>()),
          at<const int64_t>(p["bounds"].cast<uintptr_t>()),
          p["num_sequences"].cast<int64_t>(),
          p["num_heads"].cast<int64_t>(),
          p["num_key_heads"].cast<int64_t>(),
          p["head_dim"].cast<int64_t>(),
          p["scale"].cast<float>(),
          p["softcap"].cast<float>(),
          p["window"].cast<int64_t>(),
          dtype_of(p["bfloat16"].cast<bool>())};
}

// (addresses of keys, values, and the prefix's keys and values; rows, capacity, tokens held, new ones, tokens of the
// prefix, key heads, their size, whether they are bfloat16)
using CacheTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                              int64_t, int64_t, bool>;

std::vector<luthier::CachedRows> caches_of(const std::vector<CacheTuple>& tuples) {
  std::vector<luthier::CachedRows> caches;
  for (const auto& [key, value, prefix_key, prefix_value, num_rows, capacity, num_held, num_new, num_prefix,
                    num_key_heads, head_dim, bfloat16] : tuples)
    caches.push_back({at<void>(key), at<void>(value), at<const void>(prefix_key), at<const void>(prefix_value),
                      num_rows, capacity, num_held, num_new, num_prefix, num_key_heads, head_dim, dtype_of(bfloat16)});
  return caches;
}

// Without caches and first keys.
luthier::AttentionDecode attention_decode_of(const py::dict& p) {
  return {heads_of(p["query"].cast<HeadsTuple>()),
          heads_of(p["key"].cast<HeadsTuple>()),
          heads_of(p["value"].cast<HeadsTuple>()),
          at<void>(p["out"].cast<uintptr_t>()),
          at<const void>(p["cos"].cast<uintptr_t>()),
          at<const void>(p["sin"].cast<uintptr_t>()),
          nullptr,
          nullptr,
          0,
          0,
          p["num_tokens"].cast<int64_t>(),
          p["num_heads"].cast<int64_t>(),
          p["num_key_heads"].cast<int64_t>(),
          p["head_dim"].cast<int64_t>(),
          p["rotary_dim"].cast<int64_t>(),
          p["scale"].cast<float>(),
          p["softcap"].cast<float>(),
          dtype_of(p["bfloat16"].cast<bool>())};
}

void attention_decode(const py::dict& fields, const std::vector<CacheTuple>& tuples, const std::vector<int64_t>& first,
                      const std::string& isa, int num_threads) {
  const std::vector<luthier::CachedRows> caches = caches_of(tuples);
  luthier::AttentionDecode problem = attention_decode_of(fields);
  problem.caches = caches.data();
  problem.first = first.data();
  problem.num_caches = static_cast<int64_t>(caches.size());
  problem.num_rows = static_cast<int64_t>(first.size());
  const luthier::Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  luthier::attention_decode(problem, chosen, num_threads);
}

luthier::RmsNorm rms_norm_of(const py::dict& p) {
  return {at<const void>(p["x"].cast<uintptr_t>()),
          at<const void>(p["weight"].cast<uintptr_t>()),
          at<void>(p["out"].cast<uintptr_t>()),
          at<float>(p["inverse"].cast<uintptr_t>()),
          p["num_rows"].cast<int64_t>(),
          p["dim"].cast<int64_t>(),
          p["x_stride"].cast<int64_t>(),
          p["out_stride"].cast<int64_t>(),
          p["epsilon"].cast<float>(),
          p["offset"].cast<float>(),
          dtype_of(p["bfloat16"].cast<bool>())};
}

luthier::Rope rope_of(const py::dict& p) {
  return {heads_of(p["x"].cast<HeadsTuple>()),
          heads_of(p["out"].cast<HeadsTuple>()),
          at<const void>(p["cos"].cast<uintptr_t>()),
          at<const void>(p["sin"].cast<uintptr_t>()),
          p["num_tokens"].cast<int64_t>(),
          p["num_heads"].cast<int64_t>(),
          p["head_dim"].cast<int64_t>(),
          p["rotary_dim"].cast<int64_t>(),
          p["transposed"].cast<bool>(),
          dtype_of(p["bfloat16"].cast<bool>())};
}

luthier::Gated gated_of(const py::dict& p) {
  return {at<const void>(p["gate"].cast<uintptr_t>()),
          at<const void>(p["up"].cast<uintptr_t>()),
          at<const void>(p["grad_out"].cast<uintptr_t>()),
          at<void>(p["out"].cast<uintptr_t>()),
          at<void>(p["grad_gate"].cast<uintptr_t>()),
          at<void>(p["grad_up"].cast<uintptr_t>()),
          p["num_rows"].cast<int64_t>(),
          p["dim"].cast<int64_t>(),
          p["gate_stride"].cast<int64_t>(),
          p["up_stride"].cast<int64_t>(),
          p["grad_stride"].cast<int64_t>(),
          p["gelu"].cast<bool>() ? luthier::Activation::gelu_tanh : luthier::Activation::silu,
          dtype_of(p["bfloat16"].cast<bool>())};
}

luthier::Dropout dropout_of(const py::dict& p) {
  return {at<const void>(p["x"].cast<uintptr_t>()),
          at<void>(p["out"].cast<uintptr_t>()),
          p["num_rows"].cast<int64_t>(),
          p["dim"].cast<int64_t>(),
          p["x_stride"].cast<int64_t>(),
          p["out_stride"].cast<int64_t>(),
          p["seed"].cast<uint64_t>(),
          p["row0"].cast<uint64_t>(),
          p["stream"].cast<uint64_t>(),
          p["probability"].cast<double>(),
          dtype_of(p["bfloat16"].cast<bool>())};
}

luthier::Dequantise dequantise_of(const py::dict& p) {
  return {at<const void>(p["codes"].cast<uintptr_t>()),
          at<const float>(p["levels"].cast<uintptr_t>()),
          at<const float>(p["scales"].cast<uintptr_t>()),
          at<void>(p["out"].cast<uintptr_t>()),
          p["num_blocks"].cast<int64_t>(),
          p["block"].cast<int64_t>(),
          dtype_of(p["bfloat16"].cast<bool>())};
}

luthier::Moment8 moment_of(const py::dict& p) {
  return {at<uint8_t>(p["codes"].cast<uintptr_t>()), at<float>(p["scales"].cast<uintptr_t>()),
          at<const float>(p["values"].cast<uintptr_t>()), at<const uint8_t>(p["nearest"].cast<uintptr_t>())};
}

luthier::AdamW8 adamw_8bit_of(const py::dict& p) {
  return {at<float>(p["weight"].cast<uintptr_t>()),
          at<const float>(p["grad"].cast<uintptr_t>()),
          moment_of(p["mean"]),
          moment_of(p["square"]),
          p["num_blocks"].cast<int64_t>(),
          p["block"].cast<int64_t>(),
          p["learning_rate"].cast<float>(),
          p["decay"].cast<float>(),
          p["beta1"].cast<float>(),
          p["beta2"].cast<float>(),
          p["epsilon"].cast<float>(),
          p["correction1"].cast<float>(),
          p["correction2"].cast<float>()};
}

// A function of (problem, isa, num_threads) that reads its problem from a dict and runs without the GIL.
template <class Problem>
void define(py::module_& module, const char* name, Problem (*read)(const py::dict&),
            void (*run)(const Problem&, luthier::Isa, int)) {
  module.def(
      name,
      [read, run](const py::dict& fields, const std::string& isa, int num_threads) {
        const Problem problem = read(fields);
        const luthier::Isa chosen = isa_of(isa);
        py::gil_scoped_release release;
        run(problem, chosen, num_threads);
      },
      py::arg("problem"), py::kw_only(), py::arg("isa"), py::arg("num_threads"));
}

luthier::LinearCrossEntropy linear_cross_entropy_of(const py::dict& p) {
  return {at<const void>(p["hidden"].cast<uintptr_t>()),
          at<const void>(p["weight"].cast<uintptr_t>()),
          at<const int64_t>(p["target"].cast<uintptr_t>()),
          at<const float>(p["token_weight"].cast<uintptr_t>()),
          at<const int64_t>(p["rows"].cast<uintptr_t>()),
          at<float>(p["loss"].cast<uintptr_t>()),
          at<float>(p["grad_hidden"].cast<uintptr_t>()),
          at<float>(p["entropy"].cast<uintptr_t>()),
          at<float>(p["grad_entropy"].cast<uintptr_t>()),
          p["num_rows"].cast<int64_t>(),
          p["dim"].cast<int64_t>(),
          p["vocab"].cast<int64_t>(),
          p["hidden_stride"].cast<int64_t>(),
          p["weight_stride"].cast<int64_t>(),
          p["softcap"].cast<float>(),
          p["label_smoothing"].cast<float>(),
          p["z_loss"].cast<float>(),
          dtype_of(p["bfloat16"].cast<bool>())};
}

// Addresses of cosines and sines, rows, elements of a row, whether they are bfloat16.
using AnglesTuple = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, bool>;

void add_product(luthier::Program& program, const std::vector<AnyTermTuple>& tuples, int64_t num_rows,
                 int64_t num_columns, uintptr_t bias, const RowsTuple& addend, const RowsTuple& out, bool bfloat16) {
  const luthier::Product problem{nullptr,
                                 0,
                                 num_rows,
                                 num_columns,
                                 at<const void>(bias),
                                 at<const void>(addend.first),
                                 addend.second,
                                 at<void>(out.first),
                                 out.second,
                                 dtype_of(bfloat16)};
  program.add(luthier::ProductStep{problem, terms_of(tuples)});
}

void run_program(const luthier::Program& program, int64_t num_rows, const std::vector<std::vector<CacheTuple>>& layers,
                 const std::vector<int64_t>& first, const AnglesTuple& angles, const std::string& isa,
                 int num_threads) {
  const auto& [cos, sin, angle_rows, rotary_dim, bfloat16] = angles;
  luthier::ProgramRun problem{
      num_rows, {}, first, {at<const void>(cos), at<const void>(sin), angle_rows, rotary_dim, dtype_of(bfloat16)}};
  for (const auto& caches : layers) problem.layers.push_back(caches_of(caches));
  const luthier::Isa chosen = isa_of(isa);
  py::gil_scoped_release release;
  program.run(problem, chosen, num_threads);
}

void define_program(py::module_& module) {
  using luthier::Program;
  py::class_<Program>(module, "Program")
      .def(py::init<>())
      .def("product", add_product, py::kw_only(), py::arg("terms"), py::arg("num_rows"), py::arg("num_columns"),
           py::arg("bias"), py::arg("addend"), py::arg("out"), py::arg("bfloat16"))
      .def("rms_norm", [](Program& program, const py::dict& problem,
                          int64_t rows_of_row) { program.add(luthier::NormStep{rms_norm_of(problem), rows_of_row}); })
      .def("gated",
           [](Program& program, const py::dict& problem) { program.add(luthier::GateStep{gated_of(problem)}); })
      .def("round_to",
           [](Program& program, const std::vector<RoundingTuple>& problems, bool bfloat16) {
             program.add(luthier::RoundStep{roundings_of(problems), dtype_of(bfloat16)});
           })
      .def("attend", [](Program& program, const py::dict& problem, int64_t layer,
                        bool turns) { program.add(luthier::AttendStep{attention_decode_of(problem), layer, turns}); })
      .def("run", run_program, py::kw_only(), py::arg("num_rows"), py::arg("layers"), py::arg("first"),
           py::arg("angles"), py::arg("isa"), py::arg("num_threads"));
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "Luthier's CPU kernels.";
  define_program(module);
  module.def("supports", [](const std::string& isa) { return luthier::supports(isa_of(isa)); });
  module.def("product", product, py::kw_only(), py::arg("terms"), py::arg("num_rows"), py::arg("num_columns"),
             py::arg("bias"), py::arg("addend"), py::arg("out"), py::arg("bfloat16"), py::arg("float_out"),
             py::arg("isa"), py::arg("num_threads"));
  module.def("gram", gram, py::kw_only(), py::arg("problems"), py::arg("bfloat16"), py::arg("isa"),
             py::arg("num_threads"));
  module.def("round_to", round_to, py::kw_only(), py::arg("problems"), py::arg("bfloat16"), py::arg("isa"),
             py::arg("num_threads"));
  define(module, "attention", attention_of, luthier::attention);
  module.def(
      "attention_gradient",
      [](const py::dict& problem, const HeadsTuple& grad_out, const HeadsTuple& grad_query, const HeadsTuple& grad_key,
         const HeadsTuple& grad_value, const std::string& isa, int num_threads) {
        const luthier::AttentionGradient gradient{attention_of(problem), heads_of(grad_out), heads_of(grad_query),
                                                  heads_of(grad_key), heads_of(grad_value)};
        const luthier::Isa chosen = isa_of(isa);
        py::gil_scoped_release release;
        luthier::attention_gradient(gradient, chosen, num_threads);
      },
      py::arg("problem"), py::kw_only(), py::arg("grad_out"), py::arg("grad_query"), py::arg("grad_key"),
      py::arg("grad_value"), py::arg("isa"), py::arg("num_threads"));
  module.def("attention_decode", attention_decode, py::arg("problem"), py::kw_only(), py::arg("caches"),
             py::arg("first"), py::arg("isa"), py::arg("num_threads"));
  define(module, "linear_cross_entropy", linear_cross_entropy_of, luthier::linear_cross_entropy);
  define(module, "rms_norm", rms_norm_of, luthier::rms_norm);
  define(module, "rope", rope_of, luthier::rope);
  define(module, "gated", gated_of, luthier::gated);
  define(module, "dropout", dropout_of, luthier::dropout);
  define(module, "dequantise", dequantise_of, luthier::dequantise);
  define(module, "adamw_8bit", adamw_8bit_of, luthier::adamw_8bit);
  module.def(
      "rms_norm_gradient",
      [](const py::dict& forward, std::pair<uintptr_t, int64_t> grad_out, const std::string& isa, int num_threads) {
        const luthier::RmsNorm problem = rms_norm_of(forward);
        const luthier::Isa chosen = isa_of(isa);
        py::gil_scoped_release release;
        luthier::rms_norm_gradient(problem, at<const void>(grad_out.first), grad_out.second, chosen, num_threads);
      },
      py::arg("problem"), py::kw_only(), py::arg("grad_out"), py::arg("isa"), py::arg("num_threads"));
}
