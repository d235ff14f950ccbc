// Products of few rows on tiles. What costs time then is reading the matrices, once; so their rows are multiplied as
// they stand, by the few rows, which are packed once, and the sums are turned round. A sum adds the same products in
// the same order as the other way round: its bits are the same, however many rows there are.
#pragma once

namespace luthier::detail {
namespace {

template <class Path>
struct ThinProduct {
  typedef typename Path::Scalar Scalar;
  typedef typename Path::Item Item;
  const ProductTask<Path>& task;
  const Product& p = task.p;
  const int vectors = vectors_for(p.num_rows);
  Item* memory = nullptr;

  // Whether all terms are whole, and their matrices stand as rows of items.
  static bool pays(const Product& p) {
    if (!Path::has_tiles || p.num_rows > P || p.num_terms == 0) return false;
    for (int t = 0; t < p.num_terms; ++t) {
      const Term& term = p.terms[t];
      const bool is_whole = term.first_row <= 0 && term.end_row >= p.num_rows && term.num_columns >= p.num_columns;
      if (!is_whole || !term.transposed || term.contracted == 0 || !stands<Path>(term.contracted)) return false;
    }
    return true;
  }

  // Of the rows of the first `terms` terms.
  int64_t items(int terms) const {
    int64_t sum = 0;
    for (int t = 0; t < terms; ++t) sum += panel_items<Path>(p.terms[t].contracted, vectors);
    return sum;
  }

  void pack() const {
    for (int t = 0; t < p.num_terms; ++t) {
      const Term& term = p.terms[t];
      pack_rows<Path>(static_cast<const Scalar*>(term.rows), term.rows_stride, term.contracted, p.num_rows, vectors,
                      memory + items(t));
    }
  }

  int64_t num_tasks() const { return (p.num_columns + P - 1) / P; }

  void run(int64_t index) const {
    [[maybe_unused]] const typename Path::Session session{};
    const int64_t column = index * P, columns = p.num_columns - column < P ? p.num_columns - column : P;
    const int64_t made = made_elements<Path>(p) * int64_t{sizeof(Scalar)};
    float* sums = reinterpret_cast<float*>(scratch(2 * P * P * int64_t{sizeof(float)} + made));
    float* turned = sums + P * P;
    auto* space = reinterpret_cast<Scalar*>(turned + P * P);
    bool accumulate = false;
    for (int t = 0; t < p.num_terms; ++t) {
      const Term& term = p.terms[t];
      for (int64_t k = 0; k < term.contracted; k += kContractedBlock<Path>) {
        const int64_t left = term.contracted - k;
        const int64_t part = left < kContractedBlock<Path> ? left : kContractedBlock<Path>;
        const Elements<Scalar> elements = elements_of(term, {column, columns, k, part}, space);
        const Rows<Path> rows = row_operand<Path>(elements.at, elements.stride, columns, part, nullptr);
        multiply<Path>(rows, memory + items(t) + k * vectors * L, vectors, steps_for<Path>(part), sums, P, columns,
                       accumulate);
        accumulate = true;
      }
    }
    turn(sums, columns, turned);
    task.finish({0, p.num_rows, column, columns}, turned, false);
  }

  // turned[num_rows][P] = the transpose of sums[columns][P].
  void turn(const float* sums, int64_t columns, float* turned) const {
    for (int64_t c = 0; c < columns; c += L)
      for (int64_t r = 0; r < p.num_rows; r += L) {
        Vec block[L];
        for (int i = 0; i < L; ++i) block[i] = c + i < columns ? load(sums + (c + i) * P + r) : Vec{};
        transpose_from<1>(block);
        for (int i = 0; i < L && r + i < p.num_rows; ++i) store(turned + (r + i) * P + c, block[i]);
      }
  }
};

template <class Path>
void thin_product(const ProductTask<Path>& task, int num_threads) {
  ThinProduct<Path> thin{task};
  thin.memory = reinterpret_cast<typename Path::Item*>(
      shared_scratch(thin.items(task.p.num_terms) * int64_t{sizeof(typename Path::Item)}));
  thin.pack();
  parallel(
      thin.num_tasks(), num_threads,
      [](void* context, int64_t index) { static_cast<ThinProduct<Path>*>(context)->run(index); }, &thin);
}

}  // namespace
}  // namespace luthier::detail
