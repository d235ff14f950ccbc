// Matrix products on panels: a block of rows, its elements broadcast one by one, times a packed panel of at most P
// columns, which lie in the lanes of the vectors. Every element of a product is summed in rising order of the
// contracted dimension, whatever the number of rows: its bits do not depend on how rows are grouped.
#pragma once
#include "vector.inl"

namespace luthier::detail {
namespace {

// A path says how operands of type Scalar are multiplied. Items are what is packed; a step along the contracted
// dimension takes `pair` of them. Whoever multiplies holds a Session of the path meanwhile.
template <class Stored>
struct FloatPath {
  typedef Stored Scalar;
  typedef float Item;
  typedef Vec Packed;
  static constexpr int pair = 1;
  static constexpr bool has_tiles = false;
  struct Session {};
  static Vec multiply_add(Vec acc, Vec b, const float* a) { return acc + b * *a; }
  // L steps of one row, from `count` elements.
  static Vec steps_of_row(const Scalar* p, int64_t count) { return load_some(p, count); }
  // L columns of one step, from rows p and p + stride; `rows` of them exist.
  static Vec step_of_columns(const Scalar* p, int64_t, int64_t, int64_t columns) { return load_some(p, columns); }
  static void store_row(float* out, Vec v) { store(out, v); }
  static void store_step(float* out, Vec first, Vec) { store(out, first); }
};

#if defined(__AVX512BF16__)
// vdpbf16ps multiplies pairs of bfloat16 and adds them in float.
struct PairPath {
  typedef uint16_t Scalar;
  typedef uint16_t Item;
  typedef Bits Packed;
  static constexpr int pair = 2;
  static constexpr bool has_tiles = false;
  struct Session {};
  static Vec multiply_add(Vec acc, Bits b, const uint16_t* a) {
    int32_t bits;
    std::memcpy(&bits, a, 4);
    return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(bits), (__m512bh)b);
  }
  static Bits steps_of_row(const uint16_t* p, int64_t count) {
    if (count >= 2 * L) return load_raw<Bits>(p);
#if defined(__SANITIZE_ADDRESS__)
    uint16_t part[2 * L] = {};
    for (int64_t i = 0; i < count; ++i) part[i] = p[i];
    return load_raw<Bits>(part);
#else
    return (Bits)_mm512_maskz_loadu_epi16((1u << count) - 1, p);
#endif
  }
  static Bits step_of_columns(const uint16_t* p, int64_t stride, int64_t rows, int64_t columns) {
    const Bits low = (Bits)load_some(p, columns) >> 16;
    return rows > 1 ? low | (Bits)load_some(p + stride, columns) : low;
  }
  static void store_row(uint16_t* out, Vec v) { store(out, v); }
  static void store_step(uint16_t* out, Vec first, Vec second) {
    const Bits pairs = __builtin_convertvector(narrow(first), Bits) | __builtin_convertvector(narrow(second), Bits)
                                                                          << 16;
    std::memcpy(out, &pairs, sizeof pairs);
  }
};
#endif

template <class Path>
int64_t steps_for(int64_t contracted) {
  return (contracted + Path::pair - 1) / Path::pair;
}

// Items of a packed panel of `vectors` registers.
template <class Path>
int64_t panel_items(int64_t contracted, int vectors) {
  return steps_for<Path>(contracted) * Path::pair * vectors * L;
}

int vectors_for(int64_t columns) { return static_cast<int>((columns + L - 1) / L); }

constexpr int tile_rows(int vectors) {
  const int rows = (LUTHIER_REGISTERS - vectors - 2) / vectors;
  return rows < 14 ? rows : 14;
}

// c[rows][vectors * L] = (accumulate ? c : 0) + sum over steps of a(row, step) b[step][vectors * L].
template <class Path, int rows, int vectors>
void tile(const typename Path::Item* a, int64_t row_stride, int64_t step_stride, const typename Path::Item* b,
          int64_t steps, float* c, int64_t c_stride, bool accumulate) {
  typedef typename Path::Packed Packed;
  Vec acc[rows][vectors];
  for (int r = 0; r < rows; ++r)
    for (int s = 0; s < vectors; ++s) acc[r][s] = Vec{};
  // A pointer for every four rows, whose other rows an address can reach: one for each would leave no registers.
  constexpr int groups = (rows + 3) / 4;
  const typename Path::Item* at[groups];
  for (int i = 0; i < groups; ++i) at[i] = a + i * 4 * row_stride;
  const int64_t two = 2 * row_stride, three = 3 * row_stride;
  for (int64_t k = 0; k < steps; ++k) {
    Packed bs[vectors];
    for (int s = 0; s < vectors; ++s) bs[s] = load_raw<Packed>(b + s * L * Path::pair);
    b += vectors * L * Path::pair;
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const typename Path::Item* from = at[r / 4] + (r % 4 == 0   ? 0
                                                     : r % 4 == 1 ? row_stride
                                                     : r % 4 == 2 ? two
                                                                  : three);
      for (int s = 0; s < vectors; ++s) acc[r][s] = Path::multiply_add(acc[r][s], bs[s], from);
    }
    for (int i = 0; i < groups; ++i) at[i] += step_stride;
  }
  for (int r = 0; r < rows; ++r)
    for (int s = 0; s < vectors; ++s) {
      float* to = c + r * c_stride + s * L;
      // Not where the sum starts: sums of blocks are closer than one long sum.
      store(to, accumulate ? load(to) + acc[r][s] : acc[r][s]);
    }
}

// The row operand: where its items stand, and how far rows and steps lie apart, in items.
template <class Path>
struct Rows {
  const typename Path::Item* items;
  int64_t row_stride, step_stride;
  Rows from(int64_t row) const { return {items + row * row_stride, row_stride, step_stride}; }
};

template <class Path, int vectors>
void multiply_panel(Rows<Path> a, const typename Path::Item* b, int64_t steps, float* c, int64_t c_stride, int64_t rows,
                    bool accumulate) {
  constexpr int R = tile_rows(vectors), H = R / 2;
  int64_t r = 0;
  for (; r + R <= rows; r += R)
    tile<Path, R, vectors>(a.from(r).items, a.row_stride, a.step_stride, b, steps, c + r * c_stride, c_stride,
                           accumulate);
  for (; r + H <= rows; r += H)
    tile<Path, H, vectors>(a.from(r).items, a.row_stride, a.step_stride, b, steps, c + r * c_stride, c_stride,
                           accumulate);
  for (; r < rows; ++r)
    tile<Path, 1, vectors>(a.from(r).items, a.row_stride, a.step_stride, b, steps, c + r * c_stride, c_stride,
                           accumulate);
}

// Packs b[contracted][columns] (rows `stride` apart).
template <class Path>
void pack_columns(const typename Path::Scalar* b, int64_t stride, int64_t contracted, int64_t columns, int vectors,
                  typename Path::Item* out) {
  for (int64_t k = 0; k < contracted; k += Path::pair) {
    // A panel takes a line or two of each row, which no hardware prefetcher follows.
    for (int64_t ahead = k + 16; ahead < k + 16 + Path::pair && ahead < contracted; ++ahead)
      for (int64_t c = 0; c < columns; c += 64 / static_cast<int64_t>(sizeof(typename Path::Scalar)))
        __builtin_prefetch(b + ahead * stride + c);
    for (int s = 0; s < vectors; ++s, out += L * Path::pair) {
      const auto step = Path::step_of_columns(b + k * stride + s * L, stride, contracted - k, columns - s * L);
      std::memcpy(out, &step, sizeof step);
    }
  }
}

template <int distance, int... lane>
struct Swap {
  template <class V>
  static void apply(V& a, V& b) {
    const V low = __builtin_shufflevector(a, b, ((lane & distance) ? L + lane - distance : lane)...);
    const V high = __builtin_shufflevector(a, b, ((lane & distance) ? L + lane : lane + distance)...);
    a = low;
    b = high;
  }
};

template <int distance, int count, int... lane>
struct SwapLanes : SwapLanes<distance, count - 1, count - 1, lane...> {};
template <int distance, int... lane>
struct SwapLanes<distance, 0, lane...> : Swap<distance, lane...> {};

template <int distance, class V>
void transpose_from(V (&m)[L]) {
  if constexpr (distance < L) {
    for (int i = 0; i < L; ++i)
      if (!(i & distance)) SwapLanes<distance, L>::apply(m[i], m[i + distance]);
    transpose_from<distance * 2>(m);
  }
}

// Packs the transpose of b[columns][contracted] (rows `stride` apart).
template <class Path>
void pack_rows(const typename Path::Scalar* b, int64_t stride, int64_t contracted, int64_t columns, int vectors,
               typename Path::Item* out) {
  typedef typename Path::Packed Packed;
  const int64_t steps = steps_for<Path>(contracted);
  for (int s = 0; s < vectors; ++s)
    for (int64_t k = 0; k < steps; k += L) {
      Packed block[L];
      for (int i = 0; i < L; ++i) {
        const int64_t column = s * L + i;
        // The panel that most likely comes next; beyond the end a prefetch does nothing.
        __builtin_prefetch(b + (column + P) * stride + k * Path::pair, 0, 2);
        block[i] = column < columns
                       ? Path::steps_of_row(b + column * stride + k * Path::pair, contracted - k * Path::pair)
                       : Packed{};
      }
      transpose_from<1>(block);
      for (int i = 0; i < L && k + i < steps; ++i)
        std::memcpy(out + ((k + i) * vectors + s) * L * Path::pair, &block[i], sizeof block[i]);
    }
}

// Whether rows of `contracted` elements can be read where they stand: they hold items, and whole steps of them.
template <class Path>
bool stands(int64_t contracted) {
  return sizeof(typename Path::Scalar) == sizeof(typename Path::Item) && contracted % Path::pair == 0;
}

// The row operand of rows[rows][contracted]: where it stands, or copied to `space` with zeros behind each row, so that
// the last step of a row reads nothing of the next.
template <class Path>
Rows<Path> row_operand(const typename Path::Scalar* a, int64_t stride, int64_t rows, int64_t contracted,
                       typename Path::Item* space) {
  if (stands<Path>(contracted)) return {reinterpret_cast<const typename Path::Item*>(a), stride, Path::pair};
  const int64_t length = steps_for<Path>(contracted) * Path::pair, padded = (length + L - 1) / L * L;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < padded; k += L)
      Path::store_row(space + r * padded + k, k < contracted ? load_some(a + r * stride + k, contracted - k) : Vec{});
  return {space, padded, Path::pair};
}

// Items that row_operand may write.
template <class Path>
int64_t row_operand_items(int64_t rows, int64_t contracted) {
  return stands<Path>(contracted) ? 0 : rows * ((contracted + Path::pair + L - 1) / L * L);
}

}  // namespace
}  // namespace luthier::detail

#include "tiles.inl"

namespace luthier::detail {
namespace {

// c[rows][vectors * L] (+)= a b, with b a packed panel of `vectors` registers.
template <class Path>
void multiply(Rows<Path> a, const typename Path::Item* b, int vectors, int64_t steps, float* c, int64_t c_stride,
              int64_t rows, bool accumulate) {
  if constexpr (Path::has_tiles) return multiply_tiles(a, b, vectors, steps, c, c_stride, rows, accumulate);
  if (vectors == 1) return multiply_panel<Path, 1>(a, b, steps, c, c_stride, rows, accumulate);
  if (vectors == 2) return multiply_panel<Path, 2>(a, b, steps, c, c_stride, rows, accumulate);
#if LUTHIER_VECTORS > 2
  if (vectors == 3) return multiply_panel<Path, 3>(a, b, steps, c, c_stride, rows, accumulate);
  if (vectors == 4) return multiply_panel<Path, 4>(a, b, steps, c, c_stride, rows, accumulate);
#endif
}

// Scratch memory cut into aligned parts: first measured with memory == nullptr, then handed out.
struct Cutter {
  char* memory;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* part = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return part;
  }
};

}  // namespace
}  // namespace luthier::detail
