// AVX2 with FMA: products of 16 bits, which hold every product of two bytes, so nothing saturates.
#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));
struct Half {
  uint16_t bits;
};
union Parts {
  Floats all;
  __m256 half[2];
};
union IntParts {
  Ints all;
  __m256i half[2];
};
union DoubleParts {
  Doubles all;
  __m256d half[2];
};

inline Floats fma16(const Floats& a, const Floats& b, const Floats& c) {
  Parts x = {a}, y = {b}, z = {c};
  for (int h = 0; h < 2; h++) z.half[h] = _mm256_fmadd_ps(x.half[h], y.half[h], z.half[h]);
  return z.all;
}
inline Floats max16(const Floats& a, const Floats& b) {  // of the plain operators GCC makes 16 comparisons
  Parts x = {a}, y = {b};
  for (int h = 0; h < 2; h++) x.half[h] = _mm256_max_ps(x.half[h], y.half[h]);
  return x.all;
}
inline Floats min16(const Floats& a, const Floats& b) {
  Parts x = {a}, y = {b};
  for (int h = 0; h < 2; h++) x.half[h] = _mm256_min_ps(x.half[h], y.half[h]);
  return x.all;
}
inline Doubles fma8(const Doubles& a, const Doubles& b, const Doubles& c) {
  DoubleParts x = {a}, y = {b}, z = {c};
  for (int h = 0; h < 2; h++) z.half[h] = _mm256_fmadd_pd(x.half[h], y.half[h], z.half[h]);
  return z.all;
}
inline Doubles max8(const Doubles& a, const Doubles& b) {
  DoubleParts x = {a}, y = {b};
  for (int h = 0; h < 2; h++) x.half[h] = _mm256_max_pd(x.half[h], y.half[h]);
  return x.all;
}
inline Doubles min8(const Doubles& a, const Doubles& b) {
  DoubleParts x = {a}, y = {b};
  for (int h = 0; h < 2; h++) x.half[h] = _mm256_min_pd(x.half[h], y.half[h]);
  return x.all;
}
inline Doubles load8(const float* p) {
  DoubleParts v;
  for (int h = 0; h < 2; h++) v.half[h] = _mm256_cvtps_pd(_mm_loadu_ps(p + 4 * h));
  return v.all;
}
inline Doubles load8(const Half* p) {
  const __m256 floats = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  DoubleParts v;
  v.half[0] = _mm256_cvtps_pd(_mm256_castps256_ps128(floats));
  v.half[1] = _mm256_cvtps_pd(_mm256_extractf128_ps(floats, 1));
  return v.all;
}
inline Doubles load8(const int8_t* p) {
  const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
  DoubleParts v;
  v.half[0] = _mm256_cvtepi32_pd(_mm256_castsi256_si128(wide));
  v.half[1] = _mm256_cvtepi32_pd(_mm256_extracti128_si256(wide, 1));
  return v.all;
}
inline void store8(float* p, const Doubles& v) {
  DoubleParts parts = {v};
  for (int h = 0; h < 2; h++) _mm_storeu_ps(p + 4 * h, _mm256_cvtpd_ps(parts.half[h]));
}
constexpr int kSums = 4;
inline Floats load16(const Half* p) {
  Parts v;
  for (int h = 0; h < 2; h++) v.half[h] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8 * h)));
  return v.all;
}
inline Floats load16(const int8_t* p) {
  Parts v;
  for (int h = 0; h < 2; h++)
    v.half[h] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8 * h))));
  return v.all;
}
inline Floats to_floats(const int32_t* p) {
  Parts v;
  for (int h = 0; h < 2; h++) v.half[h] = _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i*)(p + 8 * h)));
  return v.all;
}
inline void store16(int8_t* p, const Ints& v) {
  for (int i = 0; i < 16; i++) p[i] = (int8_t)v[i];
}
inline void put(Half* p, float x) { p->bits = (uint16_t)_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }

#include "floats.inl"

constexpr int kAhead = 1536;

// A row's integers in 16 bits, four at a time, are what multiplies four 16-bit weights of an output; sums stay in
// pairs of lanes (inputs 0-1 and 2-3 of an output) until the end.
inline __m256i four_inputs(const int8_t* x) {
  int32_t four;
  memcpy(&four, x, 4);
  return _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(four)));
}

// Adds the pairs of two vectors: 8 outputs in order.
inline __m256i join_pairs(__m256i a, __m256i b) {
  return _mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xd8);
}

// 16 outputs (a column of the tile) of R rows.
template <int R>
void dot8_column(const uint8_t* column, int inputs, const int8_t* x, ptrdiff_t stride, const int32_t* start,
                 int32_t* sums) {
  __m256i s[R][4] = {};
  for (int k = 0; k < inputs; k += 4, column += kStepBytes) {
    _mm_prefetch((const char*)column + kAhead, _MM_HINT_T0);
    __m256i w[4];
    for (int v = 0; v < 4; v++) w[v] = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(column + v * 16)));
    for (int r = 0; r < R; r++) {
      const __m256i four = four_inputs(x + r * stride + k);
      for (int v = 0; v < 4; v++) s[r][v] = _mm256_add_epi32(s[r][v], _mm256_madd_epi16(w[v], four));
    }
  }
  for (int r = 0; r < R; r++)
    for (int h = 0; h < 2; h++) {
      const __m256i eight = join_pairs(s[r][2 * h], s[r][2 * h + 1]);
      _mm256_storeu_si256((__m256i*)(sums + r * kTile + 8 * h),
                          _mm256_add_epi32(eight, _mm256_set1_epi32(start[r])));
    }
}

void dot8(const uint8_t* tile, int inputs, const int8_t* x, ptrdiff_t stride, int rows, const int32_t* start,
          int32_t* sums) {
  for (int c = 0; c < 4; c++) {
    int r = 0;
    for (; r + 2 <= rows; r += 2)
      dot8_column<2>(tile + c * 64, inputs, x + r * stride, stride, start + r, sums + r * kTile + c * 16);
    if (r < rows)
      dot8_column<1>(tile + c * 64, inputs, x + r * stride, stride, start + r, sums + r * kTile + c * 16);
  }
}

void column8(const uint8_t* column, int inputs, const int8_t* x, ptrdiff_t stride, int rows, const int32_t* start,
             int32_t* sums) {
  for (int r = 0; r < rows; r++) dot8_column<1>(column, inputs, x + r * stride, stride, start + r, sums + r * kTile);
}

inline __m256 steps8(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}

// 4 bits times 7 bits fit 16 bits in pairs, so the byte product may be used: 2 x 15 x 127 < 2^15.
void dot4_token(const uint8_t* column, const uint16_t* scale, int inputs, int group, const int8_t* x, ptrdiff_t stride,
                const int32_t* group_sums, float* sums) {
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256 total[2] = {};
  for (int k = 0, g = 0; k < inputs; g++, scale += kTile) {
    __m256i s[2][2] = {};
    const int end = k + group < inputs ? k + group : inputs;
    for (; k < end; k += 8, column += kStepBytes) {
      _mm_prefetch((const char*)column + kAhead, _MM_HINT_T0);
      for (int h = 0; h < 2; h++) {
        const __m256i both = _mm256_loadu_si256((const __m256i*)(column + 32 * h));
        const __m256i first = _mm256_and_si256(both, low);
        const __m256i second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
        for (int r = 0; r < 2; r++) {
          int32_t a, b;
          memcpy(&a, x + r * stride + k, 4);
          memcpy(&b, x + r * stride + k + 4, 4);
          const __m256i one = _mm256_maddubs_epi16(first, _mm256_set1_epi32(a));
          const __m256i two = _mm256_maddubs_epi16(second, _mm256_set1_epi32(b));
          s[r][h] = _mm256_add_epi32(s[r][h], _mm256_madd_epi16(one, ones));
          s[r][h] = _mm256_add_epi32(s[r][h], _mm256_madd_epi16(two, ones));
        }
      }
    }
    for (int h = 0; h < 2; h++) {
      const __m256i both = _mm256_add_epi32(_mm256_slli_epi32(s[0][h], 8), s[1][h]);
      const __m256 sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(both, _mm256_set1_epi32(group_sums[g])));
      total[h] = _mm256_fmadd_ps(sum, steps8(scale + 8 * h), total[h]);
    }
  }
  for (int h = 0; h < 2; h++) _mm256_storeu_ps(sums + 8 * h, total[h]);
}

void dot4(const uint8_t* tile, const uint16_t* scale, int inputs, int group, const int8_t* x, ptrdiff_t stride,
          int tokens, const int32_t* group_sums, float* sums) {
  const int groups = (inputs + group - 1) / group;
  for (int m = 0; m < tokens; m++)
    for (int c = 0; c < 4; c++)
      dot4_token(tile + c * 64, scale + c * 16, inputs, group, x + 2 * m * stride, stride, group_sums + m * groups,
                 sums + m * kTile + c * 16);
}

uint64_t read_all(const uint8_t* bytes, size_t n) {
  __m256i seen[8] = {};
  for (size_t i = 0; i < n; i += kStepBytes)
    for (int v = 0; v < 8; v++) {
      if (v % 2 == 0) _mm_prefetch((const char*)bytes + i + kAhead + v * 32, _MM_HINT_T0);
      seen[v] = _mm256_xor_si256(seen[v], _mm256_loadu_si256((const __m256i*)(bytes + i + v * 32)));
    }
  for (int v = 1; v < 8; v++) seen[0] = _mm256_xor_si256(seen[0], seen[v]);
  return (uint64_t)_mm256_extract_epi64(seen[0], 0) ^ (uint64_t)_mm256_extract_epi64(seen[0], 1) ^
         (uint64_t)_mm256_extract_epi64(seen[0], 2) ^ (uint64_t)_mm256_extract_epi64(seen[0], 3);
}

}  // namespace

const Kernels* avx2_kernels() {
  static const Kernels kernels = {
      "avx2", 0, dot8, nullptr, nullptr, join, column8, dot4, layer_norm, quantize, sum_groups, gelu, finish8, finish4, add,
      remember, attend, ask_for, fold, largest, bounds, most, read_all,
  };
  return &kernels;
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
