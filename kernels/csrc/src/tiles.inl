// Products on the tiles of AMX: 16 rows of 32 bfloat16 (A), 16 steps of 16 columns in pairs (B), 16 x 16 sums (C).
// Panels and rows are those of vectors. Every sum runs over steps in rising order, from zero, wherever a row stands in
// its tile: its bits do not depend on how rows are grouped.
#pragma once
#include "vector.inl"

namespace luthier::detail {
namespace {

#if defined(__AMX_BF16__)
struct TilePath : PairPath {
  static constexpr bool has_tiles = true;
  // The shapes of tiles belong to a thread, and a library may have left its own: they are set for each task. Released
  // tiles are not saved when the thread is switched away.
  struct Session {
    Session() {
      struct {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } shapes;
      _tile_loadconfig(&shapes);
    }
    Session(const Session&) = delete;
    ~Session() { _tile_release(); }
  };
};

constexpr int64_t kTile = 16, kPair = 2, kTileItems = kTile * kTile * kPair, kTileBytes = 64;

// The compiler does not know that a tile is loaded from memory: what was stored there must be stored before.
void stored_before_tiles_load() { __asm__ volatile("" ::: "memory"); }

// Where a tile is loaded from.
struct TileAt {
  const uint16_t* items;
  int64_t stride_bytes;
};

// Where the parts of a product that fill no tile are laid out for one, zeros behind them.
struct alignas(64) TileSpace {
  uint16_t rows[2][kTileItems], columns[2][kTileItems];
  float sums[4][kTile * kTile];
};

// Rows [row, row + num_rows) of an operand, steps [step, step + num_steps), each at most a tile. An operand of steps
// apart is padded to whole vectors of rows. Rows that there are not are whatever `space` holds: their sums go nowhere.
TileAt tile_of_rows(Rows<TilePath> a, int64_t step, int64_t num_rows, int64_t num_steps, uint16_t* space) {
  const uint16_t* from = a.items + step * a.step_stride;
  if (a.step_stride == kPair) {
    if (num_rows == kTile && num_steps == kTile) return {from, a.row_stride * kPair};
    for (int64_t r = 0; r < num_rows; ++r) {
      const Bits row = PairPath::steps_of_row(from + r * a.row_stride, num_steps * kPair);
      std::memcpy(space + r * kTile * kPair, &row, sizeof row);
    }
  } else {
    Bits block[L];
    for (int i = 0; i < L; ++i) block[i] = i < num_steps ? load_raw<Bits>(from + i * a.step_stride) : Bits{};
    transpose_from<1>(block);
    std::memcpy(space, block, sizeof block);
  }
  stored_before_tiles_load();
  return {space, kTileBytes};
}

// Steps [step, step + num_steps) of the `s`-th vector of columns of a panel.
TileAt tile_of_columns(const uint16_t* panel, int vectors, int s, int64_t step, int64_t num_steps, uint16_t* space) {
  const uint16_t* from = panel + (step * vectors + s) * L * kPair;
  if (num_steps == kTile) return {from, vectors * kTileBytes};
  for (int64_t i = 0; i < kTile; ++i) {
    const Bits columns = i < num_steps ? load_raw<Bits>(from + i * vectors * L * kPair) : Bits{};
    std::memcpy(space + i * L * kPair, &columns, sizeof columns);
  }
  stored_before_tiles_load();
  return {space, kTileBytes};
}

// c[rows][L] (+)= a tile of sums.
void leave_sums(const float* sums, float* c, int64_t c_stride, int64_t rows, bool accumulate) {
  for (int64_t r = 0; r < rows; ++r) {
    const Vec sum = load(sums + r * L);
    store(c + r * c_stride, accumulate ? load(c + r * c_stride) + sum : sum);
  }
}

// One step of the four sums: tiles 0 to 3 are added to, 4 to 7 loaded.
template <int columns>
void multiply_step(TileAt top, TileAt bottom, TileAt left, TileAt right) {
  _tile_loadd(6, left.items, left.stride_bytes);
  _tile_loadd(4, top.items, top.stride_bytes);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(5, bottom.items, bottom.stride_bytes);
  _tile_dpbf16ps(2, 5, 6);
  if constexpr (columns > 1) {
    _tile_loadd(7, right.items, right.stride_bytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Two tiles of rows times one or two of the columns, the first of them `s`.
template <int columns>
void multiply_square(Rows<TilePath> a, const uint16_t* b, int vectors, int s, int64_t steps, float* c, int64_t c_stride,
                     bool accumulate, TileSpace& space) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  int64_t step = 0;
  if (a.step_stride == kPair) {
    const int64_t row_bytes = a.row_stride * kPair, column_bytes = vectors * kTileBytes;
    const uint16_t *top = a.items, *bottom = a.items + kTile * a.row_stride, *left = b + s * L * kPair;
    for (; step + kTile <= steps; step += kTile) {
      multiply_step<columns>({top, row_bytes}, {bottom, row_bytes}, {left, column_bytes},
                             {left + L * kPair, column_bytes});
      top += kTile * kPair, bottom += kTile * kPair, left += kTile * vectors * L * kPair;
    }
  }
  for (; step < steps; step += kTile) {
    const int64_t count = steps - step < kTile ? steps - step : kTile;
    const TileAt top = tile_of_rows(a, step, kTile, count, space.rows[0]);
    const TileAt bottom = tile_of_rows(a.from(kTile), step, kTile, count, space.rows[1]);
    const TileAt left = tile_of_columns(b, vectors, s, step, count, space.columns[0]);
    const TileAt right = columns > 1 ? tile_of_columns(b, vectors, s + 1, step, count, space.columns[1]) : left;
    multiply_step<columns>(top, bottom, left, right);
  }
  float *first = c + s * L, *second = first + kTile * c_stride;
  const int64_t stride_bytes = c_stride * int64_t{sizeof(float)};
  if (!accumulate) {
    _tile_stored(0, first, stride_bytes);
    _tile_stored(2, second, stride_bytes);
    if constexpr (columns > 1) {
      _tile_stored(1, first + L, stride_bytes);
      _tile_stored(3, second + L, stride_bytes);
    }
    return;
  }
  _tile_stored(0, space.sums[0], kTileBytes);
  _tile_stored(2, space.sums[2], kTileBytes);
  leave_sums(space.sums[0], first, c_stride, kTile, true);
  leave_sums(space.sums[2], second, c_stride, kTile, true);
  if constexpr (columns > 1) {
    _tile_stored(1, space.sums[1], kTileBytes);
    _tile_stored(3, space.sums[3], kTileBytes);
    leave_sums(space.sums[1], first + L, c_stride, kTile, true);
    leave_sums(space.sums[3], second + L, c_stride, kTile, true);
  }
}

// One tile of rows, or of fewer, times all the columns of a panel.
template <int vectors>
void multiply_line(Rows<TilePath> a, const uint16_t* b, int64_t steps, float* c, int64_t c_stride, int64_t rows,
                   bool accumulate, TileSpace& space) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; step += kTile) {
    const int64_t count = steps - step < kTile ? steps - step : kTile;
    const TileAt left = tile_of_rows(a, step, rows, count, space.rows[0]);
    _tile_loadd(4, left.items, left.stride_bytes);
    const auto columns = [&](int s) { return tile_of_columns(b, vectors, s, step, count, space.columns[0]); };
    const TileAt first = columns(0);
    _tile_loadd(5, first.items, first.stride_bytes);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (vectors > 1) {
      const TileAt second = columns(1);
      _tile_loadd(6, second.items, second.stride_bytes);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (vectors > 2) {
      const TileAt third = columns(2);
      _tile_loadd(7, third.items, third.stride_bytes);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (vectors > 3) {
      const TileAt fourth = columns(3);
      _tile_loadd(5, fourth.items, fourth.stride_bytes);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, space.sums[0], kTileBytes);
  if constexpr (vectors > 1) _tile_stored(1, space.sums[1], kTileBytes);
  if constexpr (vectors > 2) _tile_stored(2, space.sums[2], kTileBytes);
  if constexpr (vectors > 3) _tile_stored(3, space.sums[3], kTileBytes);
  for (int s = 0; s < vectors; ++s) leave_sums(space.sums[s], c + s * L, c_stride, rows, accumulate);
}

template <int vectors>
void multiply_panel_of_tiles(Rows<TilePath> a, const uint16_t* b, int64_t steps, float* c, int64_t c_stride,
                             int64_t rows, bool accumulate) {
  TileSpace space;
  int64_t r = 0;
  for (; r + 2 * kTile <= rows; r += 2 * kTile) {
    float* to = c + r * c_stride;
    if constexpr (vectors > 1) multiply_square<2>(a.from(r), b, vectors, 0, steps, to, c_stride, accumulate, space);
    if constexpr (vectors > 3) multiply_square<2>(a.from(r), b, vectors, 2, steps, to, c_stride, accumulate, space);
    if constexpr (vectors % 2 == 1)
      multiply_square<1>(a.from(r), b, vectors, vectors - 1, steps, to, c_stride, accumulate, space);
  }
  for (; r < rows; r += kTile)
    multiply_line<vectors>(a.from(r), b, steps, c + r * c_stride, c_stride, rows - r < kTile ? rows - r : kTile,
                           accumulate, space);
}

void multiply_tiles(Rows<TilePath> a, const uint16_t* b, int vectors, int64_t steps, float* c, int64_t c_stride,
                    int64_t rows, bool accumulate) {
  stored_before_tiles_load();
  if (vectors == 1) return multiply_panel_of_tiles<1>(a, b, steps, c, c_stride, rows, accumulate);
  if (vectors == 2) return multiply_panel_of_tiles<2>(a, b, steps, c, c_stride, rows, accumulate);
  if (vectors == 3) return multiply_panel_of_tiles<3>(a, b, steps, c, c_stride, rows, accumulate);
  multiply_panel_of_tiles<4>(a, b, steps, c, c_stride, rows, accumulate);
}
#endif

}  // namespace
}  // namespace luthier::detail
