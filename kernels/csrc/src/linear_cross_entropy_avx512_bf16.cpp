#include <immintrin.h>

#define LUTHIER_PANEL 64
#define LUTHIER_LANES 16
#include "linear_cross_entropy_block.inl"

namespace luthier::detail {
namespace {

// vdpbf16ps: a step along the contracted dimension is a pair of elements.
struct PairMath {
  typedef uint16_t Item;
  static constexpr int pair = 2;
  static Vec load_items(const uint16_t* p) { return (Vec)_mm512_loadu_si512(p); }
  static Vec multiply_add(Vec acc, Vec b, const uint16_t* a) {
    int32_t bits;
    std::memcpy(&bits, a, 4);
    return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(bits), (__m512bh)b);
  }
};

struct PairPath {
  typedef PairMath Math;
  static int64_t steps(int64_t count) { return (count + 1) / 2; }
  static void pack_token(const uint16_t* x, int64_t dim, int lane, uint16_t* out) {
    for (int64_t k = 0; k < dim; ++k) out[(k / 2 * P + lane) * 2 + k % 2] = x[k];
  }
  // Rows of even length are read where they stand. Rows of odd length are copied with a zero behind each, so that
  // the last pair reads nothing of the next row.
  static const uint16_t* forward_chunk(const uint16_t* w, int64_t stride, int64_t rows, int64_t dim, char* space) {
    if (dim % 2 == 0) return w;
    uint16_t* out = reinterpret_cast<uint16_t*>(space);
    for (int64_t v = 0; v < rows; ++v) {
      std::memcpy(out + v * (dim + 1), w + v * stride, dim * 2);
      out[v * (dim + 1) + dim] = 0;
    }
    return out;
  }
  static int64_t forward_stride(int64_t stride, int64_t dim) { return dim % 2 == 0 ? stride : dim + 1; }
  // Interleaves adjacent rows: out[v / 2][k] = (w[v][k], w[v + 1][k]).
  static const uint16_t* backward_chunk(const uint16_t* w, int64_t stride, int64_t rows, int64_t dim, char* space) {
    uint32_t* out = reinterpret_cast<uint32_t*>(space);
    for (int64_t v = 0; v < rows; v += 2) {
      const uint16_t* low = w + v * stride;
      const uint16_t* high = v + 1 < rows ? low + stride : nullptr;
      for (int64_t k = 0; k < dim; ++k)
        out[v / 2 * dim + k] = low[k] | (high ? static_cast<uint32_t>(high[k]) << 16 : 0);
    }
    return reinterpret_cast<const uint16_t*>(space);
  }
  static const uint16_t* pack_dlogits(const float* dlogits, int64_t rows, char* space) {
    const __m512i weave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int64_t v = 0; v < rows; v += 2) {
      for (int s = 0; s < S; ++s) {
        const __m512 low = _mm512_loadu_ps(dlogits + v * P + s * L);
        const __m512 high = v + 1 < rows ? _mm512_loadu_ps(dlogits + (v + 1) * P + s * L) : _mm512_setzero_ps();
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        _mm512_storeu_si512(space + (v / 2 * P + s * L) * 4, _mm512_permutexvar_epi16(weave, both));
      }
    }
    return reinterpret_cast<const uint16_t*>(space);
  }
};

}  // namespace

const Kernel kernel_avx512_bf16 = {P, compute_block<FloatPath<float>, float>, compute_block<PairPath, uint16_t>};

}  // namespace luthier::detail
