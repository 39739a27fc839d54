// AVX2 with FMA. It has no product of bytes whose sums never saturate, so weights of 8 bits and inputs are multiplied as
// 16 bits, and only nibbles as bytes.
#include "kernels/kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <math.h>
#include <string.h>

#include <algorithm>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace {

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(32)));
struct Half {
  uint16_t bits;
};

inline Floats vmax(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
inline Floats vmin(Floats a, Floats b) { return (Floats)_mm256_min_ps((__m256)a, (__m256)b); }
inline Doubles vmax(Doubles a, Doubles b) { return (Doubles)_mm256_max_pd((__m256d)a, (__m256d)b); }
inline Doubles vmin(Doubles a, Doubles b) { return (Doubles)_mm256_min_pd((__m256d)a, (__m256d)b); }
inline Doubles mul_add(Doubles a, Doubles b, Doubles c) {
  return (Doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
inline Doubles load_doubles(const float* p) { return (Doubles)_mm256_cvtps_pd(_mm_loadu_ps(p)); }
inline Doubles load_doubles(const Half* p) {
  return (Doubles)_mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p)));
}
inline Doubles load_doubles(const int8_t* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return (Doubles)_mm256_cvtepi32_pd(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(four)));
}
inline Floats mul_add(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline Floats load_floats(const Half* p) { return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline Floats load_floats(const int32_t* p) { return (Floats)_mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void store(float* p, Doubles v) { _mm_storeu_ps(p, _mm256_cvtpd_ps((__m256d)v)); }
inline void store(int8_t* p, Ints v) {
  const __m256i whole = (__m256i)v;
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
}
inline void store_element(Half* p, float x) { p->bits = (uint16_t)_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
constexpr int kAccumulators = 8, kSumVectors = 2, kQueries = 4;

#include "kernels/floats.inl"
#include "kernels/float_weights.inl"
#include "kernels/attention.inl"

// ---- weights of 8 bits: as 16 bits, times x as 16 bits, so that no sum of products saturates

constexpr int kPair = 2;     // rows that share their loads of weights
constexpr int kPiece = 128;  // inputs whose weights stay in the first cache until every pair of rows has seen them

// 16 outputs (a column of the tile) of R rows; sums stay in pairs of lanes (inputs 0-1 and 2-3 of an output) until
// the end. Adds to what sums hold. Only the first rows prefetch weights.
template <int R>
void dot8_column(const uint8_t* column, int inputs, const int16_t (&x)[kPair][kPiece], bool prefetch, int32_t* sums) {
  __m256i s[R][4] = {};
  for (int k = 0; k < inputs; k += 4, column += kSliceBytes) {
    if (prefetch) prefetch_weights<64>(column);
    __m256i in[R];
    UNROLLED for (int r = 0; r < R; r++) {
      int64_t four;
      memcpy(&four, &x[r][k], 8);
      in[r] = _mm256_set1_epi64x(four);
    }
    UNROLLED for (int v = 0; v < 4; v++) {
      const __m256i w = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(column + v * 16)));
      UNROLLED for (int r = 0; r < R; r++) s[r][v] = _mm256_add_epi32(s[r][v], _mm256_madd_epi16(w, in[r]));
    }
  }
  UNROLLED for (int r = 0; r < R; r++)
    UNROLLED for (int h = 0; h < 2; h++) {
      auto* to = (__m256i*)(sums + r * kTile + 8 * h);
      const __m256i eight = _mm256_permute4x64_epi64(_mm256_hadd_epi32(s[r][2 * h], s[r][2 * h + 1]), 0xd8);
      _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), eight));
    }
}

// Adds a piece of inputs of all rows to `columns` columns of sums.
void dot8_piece(const uint8_t* part, int columns, int inputs, const int8_t* x, ptrdiff_t stride, int rows, bool prefetch,
                int32_t* sums) {
  for (int r = 0; r < rows; r += kPair) {
    const bool pair = r + 1 < rows;
    int16_t wide[kPair][kPiece];
    for (int i = 0; i < (pair ? 2 : 1); i++)
      for (int k = 0; k < inputs; k += 16) {
        const __m128i bytes = _mm_loadu_si128((const __m128i*)(x + (r + i) * stride + k));
        _mm256_storeu_si256((__m256i*)&wide[i][k], _mm256_cvtepi8_epi16(bytes));
      }
    for (int c = 0; c < columns; c++)
      (pair ? dot8_column<2> : dot8_column<1>)(part + c * 64, inputs, wide, prefetch && r == 0, sums + r * kTile + c * 16);
  }
}

// Prefetches whole tiles only: single columns lie apart.
void dot8_columns(const uint8_t* part, int columns, int inputs, const int8_t* x, ptrdiff_t stride, int rows,
                  const int32_t* start, int32_t* sums) {
  // Few rows are done with a piece soon and wait for memory, which is quicker when it is read nearly in order.
  const int piece = rows <= kPair ? 16 : kPiece;
  for (int r = 0; r < rows; r++) std::fill(sums + r * kTile, sums + r * kTile + 16 * columns, start[r]);
  for (int k = 0; k < inputs; k += piece) {
    const int n = inputs - k < piece ? inputs - k : piece;
    dot8_piece(part + size_t(k) / 4 * kSliceBytes, columns, n, x + k, stride, rows, columns == 4, sums);
  }
}

void dot8(const uint8_t* tile, int inputs, const int8_t* x, ptrdiff_t stride, int rows, const int32_t* start,
          int32_t* sums) {
  dot8_columns(tile, 4, inputs, x, stride, rows, start, sums);
}

void column8(const uint8_t* column, int inputs, const int8_t* x, ptrdiff_t stride, int rows, const int32_t* start,
             int32_t* sums) {
  dot8_columns(column, 1, inputs, x, stride, rows, start, sums);
}

// ---- nibbles, 0 to 15

inline __m256i four_inputs(const int8_t* x) {
  int32_t four;
  memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

constexpr int kSlices = 4;  // of 8 inputs, each two pairs of products: as many as 16 bits hold
static_assert(kSlices * 2 * (2 * 15 * 128) < 1 << 15, "sums of pairs would wrap");

// Adds products of R rows and 32 outputs.
template <int R, int Streams>
INLINED void add_nibbles(const uint8_t* part, int inputs, const int8_t* x, ptrdiff_t stride, bool prefetch,
                        __m256i (&s)[R][4]) {
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  for (int k = 0; k < inputs;) {
    __m256i pairs[R][4] = {};
    const int end = k + 8 * kSlices < inputs ? k + 8 * kSlices : inputs;
    for (; k < end; k += 8, part += kSliceBytes) {
      if (prefetch) prefetch_weights<128, Streams>(part);
      UNROLLED for (int v = 0; v < 4; v++) {
        const __m256i both = _mm256_loadu_si256((const __m256i*)(part + 32 * v));
        const __m256i first = _mm256_and_si256(both, low);
        const __m256i second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
        UNROLLED for (int r = 0; r < R; r++) {
          const int8_t* in = x + r * stride + k;
          pairs[r][v] = _mm256_add_epi16(pairs[r][v], _mm256_maddubs_epi16(first, four_inputs(in)));
          pairs[r][v] = _mm256_add_epi16(pairs[r][v], _mm256_maddubs_epi16(second, four_inputs(in + 4)));
        }
      }
    }
    UNROLLED for (int r = 0; r < R; r++)
      UNROLLED for (int v = 0; v < 4; v++)
        s[r][v] = _mm256_add_epi32(s[r][v], _mm256_madd_epi16(pairs[r][v], ones));
  }
}

// 32 outputs of R rows: 16 times the sums of the hi plane, and those of the lo plane.
template <int R>
void dot8_planes_part(const uint8_t* hi, const uint8_t* lo, int inputs, const int8_t* x, ptrdiff_t stride,
                     bool prefetch, int32_t* sums) {
  __m256i up[R][4] = {}, low[R][4] = {};
  add_nibbles<R, 2>(hi, inputs, x, stride, prefetch, up);
  add_nibbles<R, 2>(lo, inputs, x, stride, prefetch, low);
  for (int r = 0; r < R; r++)
    for (int v = 0; v < 4; v++) {
      auto* to = (__m256i*)(sums + r * kTile + v * 8);
      const __m256i both = _mm256_add_epi32(_mm256_slli_epi32(up[r][v], 4), low[r][v]);
      _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), both));
    }
}

void dot8_planes(const uint8_t* hi, const uint8_t* lo, int inputs, const int8_t* x, ptrdiff_t stride, int rows,
                const int32_t* start, int32_t* sums) {
  for (int r = 0; r < rows; r++) std::fill(sums + r * kTile, sums + (r + 1) * kTile, start[r]);
  constexpr int kTurn = 8 * kSlices;  // inputs of one plane, then of the other
  for (int k = 0; k < inputs; k += kTurn) {
    const int n = inputs - k < kTurn ? inputs - k : kTurn;
    for (int output = 0; output < kTile; output += 32) {
      const size_t at = size_t(k) / 8 * kSliceBytes + size_t(output) * 4;
      int r = 0;
      for (; r + 2 <= rows; r += 2)
        dot8_planes_part<2>(hi + at, lo + at, n, x + r * stride + k, stride, r == 0, sums + r * kTile + output);
      if (r < rows)
        dot8_planes_part<1>(hi + at, lo + at, n, x + r * stride + k, stride, r == 0, sums + r * kTile + output);
    }
  }
}

inline __m256 load_scales(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}

// 32 outputs of one group of one token; adds to its totals.
void dot4_group(const uint8_t* part, const uint16_t* scale, int inputs, const int8_t* x, ptrdiff_t stride, bool prefetch,
                int32_t group_sum, float* total) {
  __m256i s[2][4] = {};
  add_nibbles<2, 1>(part, inputs, x, stride, prefetch, s);
  UNROLLED for (int v = 0; v < 4; v++) {
    const __m256i both = _mm256_add_epi32(_mm256_slli_epi32(s[0][v], 8), s[1][v]);
    const __m256 sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(both, _mm256_set1_epi32(group_sum)));
    _mm256_storeu_ps(total + 8 * v, _mm256_fmadd_ps(sum, load_scales(scale + 8 * v), _mm256_loadu_ps(total + 8 * v)));
  }
}

void dot4(const uint8_t* tile, const uint16_t* scale, bool, int inputs, int group, const int8_t* x, ptrdiff_t stride,
          int tokens, const int32_t* group_sums, float* sums) {
  const int groups = (inputs + group - 1) / group;
  memset(sums, 0, size_t(tokens) * kTile * sizeof(float));
  for (int g = 0; g < groups; g++, scale += kTile) {
    const int k = g * group, n = inputs - k < group ? inputs - k : group;
    for (int output = 0; output < kTile; output += kTile / 2) {
      const uint8_t* part = tile + size_t(k) / 8 * kSliceBytes + output * 4;
      for (int m = 0; m < tokens; m++)
        dot4_group(part, scale + output, n, x + 2 * m * stride + k, stride, m == 0, group_sums[m * groups + g],
                   sums + m * kTile + output);
    }
  }
}

// 32 outputs of one group of R rows; adds to their sums.
template <int R>
void dot4_factors_group(const uint8_t* part, const int8_t* factor, int inputs, const int8_t* x, ptrdiff_t stride,
                        bool prefetch, const int32_t* group_sums, ptrdiff_t groups, int32_t* sums) {
  __m256i s[R][4] = {};
  add_nibbles<R, 1>(part, inputs, x, stride, prefetch, s);
  UNROLLED for (int v = 0; v < 4; v++) {
    const __m256i factors = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(factor + 8 * v)));
    UNROLLED for (int r = 0; r < R; r++) {
      auto* total = (__m256i*)(sums + r * kTile + 8 * v);
      const __m256i sum = _mm256_sub_epi32(s[r][v], _mm256_set1_epi32(group_sums[r * groups]));
      _mm256_storeu_si256(total, _mm256_add_epi32(_mm256_loadu_si256(total), _mm256_mullo_epi32(sum, factors)));
    }
  }
}

void dot4_factors(const uint8_t* tile, const int8_t* factor, int inputs, int group, const int8_t* x, ptrdiff_t stride,
                  int rows, const int32_t* group_sums, int32_t* sums) {
  const int groups = (inputs + group - 1) / group;
  memset(sums, 0, size_t(rows) * kTile * sizeof(int32_t));
  for (int g = 0; g < groups; g++, factor += kTile) {
    const int k = g * group, n = inputs - k < group ? inputs - k : group;
    for (int output = 0; output < kTile; output += kTile / 2) {
      const uint8_t* part = tile + size_t(k) / 8 * kSliceBytes + output * 4;
      int r = 0;
      for (; r + 2 <= rows; r += 2)
        dot4_factors_group<2>(part, factor + output, n, x + r * stride + k, stride, r == 0, group_sums + r * groups + g,
                              groups, sums + r * kTile + output);
      if (r < rows)
        dot4_factors_group<1>(part, factor + output, n, x + r * stride + k, stride, r == 0, group_sums + r * groups + g,
                              groups, sums + r * kTile + output);
    }
  }
}

uint64_t read_all(const uint8_t* bytes, size_t n) {
  __m256i seen[8] = {};
  for (size_t i = 0; i < n; i += kSliceBytes) {
    prefetch_weights<kSliceBytes>(bytes + i);
    UNROLLED for (int v = 0; v < 8; v++)
      seen[v] = _mm256_xor_si256(seen[v], _mm256_loadu_si256((const __m256i*)(bytes + i + v * 32)));
  }
  for (int v = 1; v < 8; v++) seen[0] = _mm256_xor_si256(seen[0], seen[v]);
  return (uint64_t)_mm256_extract_epi64(seen[0], 0) ^ (uint64_t)_mm256_extract_epi64(seen[0], 1) ^
         (uint64_t)_mm256_extract_epi64(seen[0], 2) ^ (uint64_t)_mm256_extract_epi64(seen[0], 3);
}

}  // namespace

const Kernels* avx2_kernels() {
  static const Kernels kernels = [] {
    Kernels k = float_kernels("avx2");
    k.dot8 = dot8;
    k.planes_max_rows = Kernels::kAnyRows;
    k.dot8_planes = dot8_planes;
    k.column8 = column8;
    k.dot4 = dot4;
    k.dot4_factors = dot4_factors;
    k.read = read_all;
    return k;
  }();
  return &kernels;
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
