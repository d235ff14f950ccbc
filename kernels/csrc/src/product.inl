// product and gram: the matrix products of a linear layer with a low-rank update, and of its gradients.
#pragma once
#include "dequantise.inl"
#include "luthier/product.hpp"
#include "matrix.inl"

namespace luthier::detail {
namespace {

// Rows and contracted elements that a task holds at a time: the packed panel and the sums stay in the second cache.
constexpr int64_t kRowBlock = 768;
// In float, where the sum's own rounding is all there is, sums of shorter blocks are added.
template <class Path>
constexpr int64_t kContractedBlock = Path::pair == 2 ? 2048 : 256;

// The rows of all terms as floats, made once for all panels, of which each would make them again. Only where that is
// much, and not more than `kMostWideItems`.
constexpr int64_t kLeastWidePanels = 4, kMostWideItems = int64_t{1} << 24, kWideChunk = 32;

template <class Path>
struct WideRows {
  typedef typename Path::Scalar Scalar;
  const Product& p;
  float* memory;

  static int64_t stride(const Term& term) { return (term.contracted + L - 1) / L * L; }
  int64_t first(const Term& term) const { return term.first_row > 0 ? term.first_row : 0; }
  int64_t count(const Term& term) const {
    const int64_t end = term.end_row < p.num_rows ? term.end_row : p.num_rows;
    return end > first(term) ? end - first(term) : 0;
  }
  int64_t chunks(const Term& term) const { return (count(term) + kWideChunk - 1) / kWideChunk; }

  // Items, or chunks of rows, of the first `terms` terms.
  int64_t items(int terms) const {
    int64_t sum = 0;
    for (int t = 0; t < terms; ++t) sum += count(p.terms[t]) * stride(p.terms[t]);
    return sum;
  }
  int64_t num_chunks() const {
    int64_t sum = 0;
    for (int t = 0; t < p.num_terms; ++t) sum += chunks(p.terms[t]);
    return sum;
  }

  bool pays() const {
    if (Path::pair != 1 || sizeof(Scalar) == sizeof(float)) return false;
    return p.num_columns >= kLeastWidePanels * P && items(p.num_terms) <= kMostWideItems;
  }

  // Where a row of a term stands.
  const float* at(int term, int64_t row) const {
    return memory + items(term) + (row - first(p.terms[term])) * stride(p.terms[term]);
  }

  void widen(int64_t chunk) const {
    int t = 0;
    for (; chunk >= chunks(p.terms[t]); ++t) chunk -= chunks(p.terms[t]);
    const Term& term = p.terms[t];
    const int64_t row = first(term) + chunk * kWideChunk, left = first(term) + count(term) - row;
    const Scalar* from = static_cast<const Scalar*>(term.rows);
    for (int64_t r = row; r < row + (left < kWideChunk ? left : kWideChunk); ++r) {
      float* to = memory + items(t) + (r - first(term)) * stride(term);
      for (int64_t k = 0; k < term.contracted; k += L)
        store(to + k, load_some(from + r * term.rows_stride + k, term.contracted - k));
    }
  }
};

// Steps [step, step + steps) of the columns [column, column + columns) of a term.
struct Piece {
  int64_t column, columns, step, steps;
};

// Where elements stand, and how far their rows lie apart.
template <class Scalar>
struct Elements {
  const Scalar* at;
  int64_t stride;
};

// The elements of a piece as they lie in the matrix; of a quantised one they are made, in `space`.
template <class Scalar>
Elements<Scalar> elements_of(const Term& term, const Piece& piece, Scalar* space) {
  const int64_t row = term.transposed ? piece.column : piece.step, column = term.transposed ? piece.step : piece.column;
  if (!term.quantised.codes)
    return {static_cast<const Scalar*>(term.matrix) + row * term.matrix_stride + column, term.matrix_stride};
  const int64_t rows = term.transposed ? piece.columns : piece.steps;
  const int64_t columns = term.transposed ? piece.steps : piece.columns;
  dequantise_part(term.quantised, term.matrix_stride, row, rows, column, columns, space);
  return {space, columns};
}

// The elements that `elements_of` makes at a time.
template <class Path>
int64_t made_elements(const Product& p) {
  int64_t most = 0;
  for (int t = 0; t < p.num_terms; ++t) {
    const int64_t steps =
        p.terms[t].contracted < kContractedBlock<Path> ? p.terms[t].contracted : kContractedBlock<Path>;
    if (p.terms[t].quantised.codes && steps * P > most) most = steps * P;
  }
  return most;
}

template <class Path>
void pack_piece(const Term& term, const Piece& piece, int vectors, typename Path::Scalar* space,
                typename Path::Item* panel) {
  const auto elements = elements_of(term, piece, space);
  if (term.transposed)
    pack_rows<Path>(elements.at, elements.stride, piece.steps, piece.columns, vectors, panel);
  else
    pack_columns<Path>(elements.at, elements.stride, piece.steps, piece.columns, vectors, panel);
}

// The panels of all terms, packed once for all blocks of rows, of which each would pack them again. Only where products
// are so quick that packing is felt, and where they are not more than `kMostPackedItems`.
constexpr int64_t kPackedRowBlock = 256, kMostPackedItems = int64_t{1} << 24;

template <class Path>
struct PackedPanels {
  typedef typename Path::Scalar Scalar;
  typedef typename Path::Item Item;
  const Product& p;
  Item* memory;

  int64_t num_panels() const { return (p.num_columns + P - 1) / P; }
  static int64_t items_of_panel(const Term& term) { return panel_items<Path>(term.contracted, LUTHIER_VECTORS); }

  // Of the first `terms` terms.
  int64_t items(int terms) const {
    int64_t sum = 0;
    for (int t = 0; t < terms; ++t) sum += num_panels() * items_of_panel(p.terms[t]);
    return sum;
  }

  bool pays() const {
    return Path::has_tiles && p.num_rows > kPackedRowBlock && items(p.num_terms) <= kMostPackedItems;
  }

  Item* at(int term, int64_t column) const { return memory + items(term) + column / P * items_of_panel(p.terms[term]); }

  void pack(int64_t index) const {
    const int t = static_cast<int>(index / num_panels());
    const Term& term = p.terms[t];
    const int64_t column = index % num_panels() * P, rest = p.num_columns - column < P ? p.num_columns - column : P;
    const int64_t columns = term.num_columns - column < rest ? term.num_columns - column : rest;
    if (columns <= 0) return;
    auto* space = reinterpret_cast<Scalar*>(scratch(made_elements<Path>(p) * int64_t{sizeof(Scalar)}));
    const int vectors = vectors_for(rest);
    for (int64_t k = 0; k < term.contracted; k += kContractedBlock<Path>) {
      const int64_t part = term.contracted - k < kContractedBlock<Path> ? term.contracted - k : kContractedBlock<Path>;
      pack_piece<Path>(term, {column, columns, k, part}, vectors, space, at(t, column) + k * vectors * L);
    }
  }
};

template <class Path>
struct ProductTask {
  typedef typename Path::Scalar Scalar;
  typedef typename Path::Item Item;
  const Product& p;
  int num_threads;
  const WideRows<Path>& wide;
  const PackedPanels<Path>& packed;

  int64_t num_panels() const { return (p.num_columns + P - 1) / P; }
  // Rows are cut finer while there are fewer tasks than threads could share evenly.
  int64_t row_block() const {
    int64_t block = packed.memory ? kPackedRowBlock : kRowBlock;
    while (block > 48 && num_panels() * ((p.num_rows + block - 1) / block) < 4 * num_threads) block /= 2;
    return block;
  }
  int64_t num_tasks() const { return num_panels() * ((p.num_rows + row_block() - 1) / row_block()); }

  // The most items that a panel, or the copied rows, of any block of any term need.
  int64_t most_panel_items(int vectors) const {
    return most([vectors](int64_t part) { return panel_items<Path>(part, vectors); });
  }
  int64_t most_row_items(int64_t rows) const {
    if (wide.memory) return 0;
    return most([rows](int64_t part) { return row_operand_items<Path>(rows, part); });
  }

  // Whether the first term gives every sum its first value.
  bool begins_whole() const {
    if (p.num_terms == 0) return true;
    const Term& term = p.terms[0];
    return term.contracted > 0 && term.first_row <= 0 && term.end_row >= p.num_rows &&
           term.num_columns >= p.num_columns;
  }

  template <class Size>
  int64_t most(Size size) const {
    int64_t most = 0;
    for (int t = 0; t < p.num_terms; ++t) {
      const int64_t contracted = p.terms[t].contracted;
      const int64_t whole = contracted < kContractedBlock<Path> ? 0 : size(kContractedBlock<Path>);
      const int64_t rest = size(contracted % kContractedBlock<Path>);
      const int64_t larger = whole > rest ? whole : rest;
      most = most > larger ? most : larger;
    }
    return most;
  }

  void run(int64_t task) const {
    [[maybe_unused]] const typename Path::Session session{};
    const int64_t column = task % num_panels() * P, row = task / num_panels() * row_block();
    const int64_t columns = p.num_columns - column < P ? p.num_columns - column : P;
    const int64_t rows = p.num_rows - row < row_block() ? p.num_rows - row : row_block();
    const int vectors = vectors_for(columns);
    Cutter cutter{nullptr};
    for (int pass = 0; pass < 2; ++pass) {
      Item* panel = cutter.take<Item>(packed.memory ? 0 : most_panel_items(vectors));
      Scalar* made = cutter.take<Scalar>(packed.memory ? 0 : made_elements<Path>(p));
      Item* space = cutter.take<Item>(most_row_items(rows));
      float* sums = cutter.take<float>(rows * P);
      if (pass == 0) {
        cutter = Cutter{scratch(cutter.used)};
        continue;
      }
      // With a first term of some rows alone, what is summed first differs from row to row: all sums begin at zero.
      bool accumulate = !begins_whole();
      if (accumulate) std::memset(sums, 0, rows * P * sizeof(float));
      for (int t = 0; t < p.num_terms; ++t)
        add(t, {row, rows, column, columns}, vectors, {panel, made, space, sums}, accumulate);
      finish({row, rows, column, columns}, sums, !accumulate);
    }
  }

  struct Window {
    int64_t row, rows, column, columns;
  };

  // What a task writes on its way: a packed panel, numbers of a quantised matrix, copied rows, sums.
  struct Room {
    Item* panel;
    Scalar* made;
    Item* rows;
    float* sums;
  };

  void add(int t, const Window& w, int vectors, const Room& room, bool& accumulate) const {
    const Term& term = p.terms[t];
    const int64_t first = w.row > term.first_row ? w.row : term.first_row;
    const int64_t end = w.row + w.rows < term.end_row ? w.row + w.rows : term.end_row;
    const int64_t columns = term.num_columns - w.column < w.columns ? term.num_columns - w.column : w.columns;
    if (first >= end || columns <= 0) return;
    const Scalar* a = static_cast<const Scalar*>(term.rows) + first * term.rows_stride;
    float* own_sums = room.sums + (first - w.row) * P;
    for (int64_t k = 0; k < term.contracted; k += kContractedBlock<Path>) {
      const int64_t part = term.contracted - k < kContractedBlock<Path> ? term.contracted - k : kContractedBlock<Path>;
      const Item* columns_of = room.panel;
      if (packed.memory)
        columns_of = packed.at(t, w.column) + k * vectors * L;
      else
        pack_piece<Path>(term, {w.column, columns, k, part}, vectors, room.made, room.panel);
      const Rows<Path> operand = row_operand_at(t, first, k, a, end - first, part, room.rows);
      multiply<Path>(operand, columns_of, vectors, steps_for<Path>(part), own_sums, P, end - first, accumulate);
      accumulate = true;
    }
  }

  Rows<Path> row_operand_at(int t, int64_t first, int64_t k, const Scalar* a, int64_t rows, int64_t part,
                            Item* space) const {
    if constexpr (Path::pair == 1)
      if (wide.memory) return {wide.at(t, first) + k, WideRows<Path>::stride(p.terms[t]), 1};
    return row_operand<Path>(a + k, p.terms[t].rows_stride, rows, part, space);
  }

  void finish(const Window& w, const float* sums, bool empty) const {
    const bool plain = !empty && !p.bias && !p.addend && !p.float_out && w.columns == P;
    for (int64_t r = 0; r < w.rows; ++r) {
      if (plain)
        round_row(sums + r * P, static_cast<Scalar*>(p.out) + (w.row + r) * p.out_stride + w.column);
      else
        finish_row(w, r, empty ? nullptr : sums + r * P);
    }
  }

  static void round_row(const float* sums, Scalar* out) {
    for (int s = 0; s < LUTHIER_VECTORS; ++s) store(out + s * L, load(sums + s * L));
  }

  void finish_row(const Window& w, int64_t r, const float* sums) const {
    for (int64_t c = 0; c < w.columns; c += L) {
      const int64_t count = w.columns - c;
      Vec value = sums ? load(sums + c) : Vec{};
      if (p.bias) value += load_some(static_cast<const Scalar*>(p.bias) + w.column + c, count);
      if (p.addend)
        value += load_some(static_cast<const Scalar*>(p.addend) + (w.row + r) * p.addend_stride + w.column + c, count);
      const int64_t at = (w.row + r) * p.out_stride + w.column + c;
      if (p.float_out)
        store_some(static_cast<float*>(p.out) + at, value, count);
      else
        store_some(static_cast<Scalar*>(p.out) + at, value, count);
    }
  }
};

}  // namespace
}  // namespace luthier::detail

#include "thin_product.inl"

namespace luthier::detail {
namespace {

template <class Path>
void product_of(const Product& problem, int num_threads) {
  if (problem.num_rows == 0 || problem.num_columns == 0) return;
  WideRows<Path> wide{problem, nullptr};
  PackedPanels<Path> packed{problem, nullptr};
  ProductTask<Path> task{problem, num_threads, wide, packed};
  if constexpr (Path::has_tiles)
    if (ThinProduct<Path>::pays(problem)) return thin_product(task, num_threads);
  if (wide.pays()) {
    wide.memory = reinterpret_cast<float*>(shared_scratch(wide.items(problem.num_terms) * int64_t{sizeof(float)}));
    parallel(
        wide.num_chunks(), num_threads,
        [](void* context, int64_t chunk) { static_cast<WideRows<Path>*>(context)->widen(chunk); }, &wide);
  }
  if (packed.pays()) {
    packed.memory = reinterpret_cast<typename Path::Item*>(
        shared_scratch(packed.items(problem.num_terms) * int64_t{sizeof(typename Path::Item)}));
    parallel(
        packed.num_panels() * problem.num_terms, num_threads,
        [](void* context, int64_t index) { static_cast<PackedPanels<Path>*>(context)->pack(index); }, &packed);
  }
  parallel(
      task.num_tasks(), num_threads,
      [](void* context, int64_t index) { static_cast<ProductTask<Path>*>(context)->run(index); }, &task);
}

// Writes scale * sums[rank][P] as columns [column, column + columns) of the result.
void store_gram(const Gram& p, const float* sums, int64_t column, int64_t columns) {
  if (!p.transposed) {
    for (int64_t r = 0; r < p.rank; ++r)
      for (int64_t c = 0; c < columns; c += L)
        store_some(p.out + r * p.num_columns + column + c, load(sums + r * P + c) * p.scale, columns - c);
    return;
  }
  for (int64_t c = 0; c < columns; c += L)
    for (int64_t r = 0; r < p.rank; r += L) {
      Vec block[L];
      for (int i = 0; i < L; ++i) block[i] = r + i < p.rank ? load(sums + (r + i) * P + c) * p.scale : Vec{};
      transpose_from<1>(block);
      for (int i = 0; i < L && c + i < columns; ++i)
        store_some(p.out + (column + c + i) * p.rank + r, block[i], p.rank - r);
    }
}

// A task computes P columns of the result; the rows are contracted in one order.
template <class Path>
void gram_panel(const Gram& p, int64_t column) {
  typedef typename Path::Scalar Scalar;
  typedef typename Path::Item Item;
  constexpr int64_t kRows = Path::pair == 2 ? 256 : 64;
  [[maybe_unused]] const typename Path::Session session{};
  const int64_t columns = p.num_columns - column < P ? p.num_columns - column : P;
  const int vectors = vectors_for(columns), rank_vectors = vectors_for(p.rank);
  Cutter cutter{nullptr};
  for (int pass = 0; pass < 2; ++pass) {
    Item* right = cutter.take<Item>(panel_items<Path>(kRows, vectors));
    Item* left = cutter.take<Item>(panel_items<Path>(kRows, rank_vectors));
    float* sums = cutter.take<float>(p.rank * P);
    if (pass == 0) {
      cutter = Cutter{scratch(cutter.used)};
      continue;
    }
    std::memset(sums, 0, p.rank * P * sizeof(float));
    for (int64_t row = 0; row < p.num_rows; row += kRows) {
      const int64_t rows = p.num_rows - row < kRows ? p.num_rows - row : kRows;
      pack_columns<Path>(static_cast<const Scalar*>(p.right) + row * p.right_stride + column, p.right_stride, rows,
                         columns, vectors, right);
      pack_columns<Path>(static_cast<const Scalar*>(p.left) + row * p.left_stride, p.left_stride, rows, p.rank,
                         rank_vectors, left);
      const Rows<Path> operand{left, Path::pair, rank_vectors * L * Path::pair};
      multiply<Path>(operand, right, vectors, steps_for<Path>(rows), sums, P, p.rank, true);
    }
    store_gram(p, sums, column, columns);
  }
}

struct GramTask {
  const Gram* problems;
  int64_t most_panels;
};

template <class Path>
void gram_of(const Gram* problems, int num_problems, int num_threads) {
  GramTask task{problems, 0};
  for (int i = 0; i < num_problems; ++i) {
    const int64_t panels = (problems[i].num_columns + P - 1) / P;
    task.most_panels = task.most_panels > panels ? task.most_panels : panels;
  }
  parallel(
      task.most_panels * num_problems, num_threads,
      [](void* context, int64_t index) {
        const GramTask& all = *static_cast<const GramTask*>(context);
        const Gram& problem = all.problems[index / all.most_panels];
        const int64_t column = index % all.most_panels * P;
        if (problem.rank > 0 && column < problem.num_columns) gram_panel<Path>(problem, column);
      },
      &task);
}

}  // namespace
}  // namespace luthier::detail
