// AVX512 with VNNI: four products of bytes a lane and instruction, added without saturation; and for many rows
// the matrix unit (AMX), where the processor has one and the system lends it.
#include "kernels/kernels.h"
#include "runtime/pages.h"

#if defined(__x86_64__)

#include <cpuid.h>
#include <immintrin.h>
#include <math.h>
#include <string.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#endif

namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));
struct Half {
  uint16_t bits;
};

inline Floats vmax(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
inline Floats vmin(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
inline Doubles vmax(Doubles a, Doubles b) { return (Doubles)_mm512_max_pd((__m512d)a, (__m512d)b); }
inline Doubles vmin(Doubles a, Doubles b) { return (Doubles)_mm512_min_pd((__m512d)a, (__m512d)b); }
inline Doubles mul_add(Doubles a, Doubles b, Doubles c) {
  return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
inline Doubles load_doubles(const float* p) { return (Doubles)_mm512_cvtps_pd(_mm256_loadu_ps(p)); }
inline Doubles load_doubles(const Half* p) {
  return (Doubles)_mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
}
inline Doubles load_doubles(const int8_t* p) {
  return (Doubles)_mm512_cvtepi32_pd(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline Floats mul_add(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline Floats load_floats(const Half* p) { return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline Floats load_floats(const int32_t* p) { return (Floats)_mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
inline void store(float* p, Doubles v) { _mm256_storeu_ps(p, _mm512_cvtpd_ps((__m512d)v)); }
inline void store(int8_t* p, Ints v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v)); }
inline void store_element(Half* p, float x) { p->bits = (uint16_t)_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
constexpr int kAccumulators = 16, kSumVectors = 4, kQueries = kMaxQueries;

#include "kernels/floats.inl"
#include "kernels/float_weights.inl"
#include "kernels/attention.inl"

// Or what AMD made since.
bool is_zen5() {
  unsigned a = 0, b, c, d;
  __builtin_cpu_init();
  if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &a, &b, &c, &d)) return false;
  return (a >> 8 & 15) + (a >> 20 & 255) >= 0x1a;  // its family
}

// Of this processor; avx512_kernels() sets them. (Initializers here would run, with AVX512, on every processor.)
Prefetch ahead = kUsualPrefetch;
bool matrix_unit = false;

inline __m512i four_inputs(const int8_t* x) {
  int32_t four;
  memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

// 16 scales of bfloat16 as floats, whose upper 16 bits they are.
inline __m512 load_scales(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

#if defined(__clang__) || __GNUC__ >= 11
#include "kernels/matrix_unit.inl"
#else  // GCC knows the unit from version 11 on
constexpr int kUnitInputs = 64, kGemmMinRows = 16, kGemm4MinRows = 32;
bool has_matrix_unit() { return false; }
void gemm(const uint8_t*, int, const int8_t*, ptrdiff_t, int, const int32_t*, int32_t*) {}
void gemm4(const uint8_t*, const uint16_t*, int, int, const int8_t*, ptrdiff_t, int, const int32_t*, float*) {}
void gemm4_factors(const uint8_t*, const int8_t*, int, int, const int8_t*, ptrdiff_t, int, const int32_t*, int32_t*) {}
#endif

// Weights of 64 outputs as they lie: 4 inputs a slice.
struct Bytes {
  static constexpr int kInputs = 4;
  const uint8_t* tile;

  INLINED void prefetch() const { prefetch_weights<kSliceBytes>(tile, ahead); }
  __m512i of(int, int v) const { return _mm512_loadu_si512(tile + v * 64); }
  void skip(int inputs) { tile += inputs / kInputs * kSliceBytes; }
};

// The same merged from nibble planes: 8 inputs a slice, four in the low nibbles and four in the high.
struct NibblePlanes {
  static constexpr int kInputs = 8;
  const uint8_t *hi, *lo;

  INLINED void prefetch() const {
    prefetch_weights<kSliceBytes, 2>(hi, ahead);
    prefetch_weights<kSliceBytes, 2>(lo, ahead);
  }
  __m512i of(int four, int v) const {
    constexpr int kFirstWhereMask = 0xca;  // mask ? a : b
    const __m512i mask = _mm512_set1_epi8(int8_t(0xf0));
    const __m512i up = _mm512_loadu_si512(hi + v * 64), low = _mm512_loadu_si512(lo + v * 64);
    return four ? _mm512_ternarylogic_epi32(mask, up, _mm512_srli_epi16(low, 4), kFirstWhereMask)
                : _mm512_ternarylogic_epi32(mask, _mm512_slli_epi16(up, 4), low, kFirstWhereMask);
  }
  void skip(int inputs) {
    hi += inputs / kInputs * kSliceBytes;
    lo += inputs / kInputs * kSliceBytes;
  }
};

// Adds to the sums of R rows at once: 4 R of them stay in registers, each slice of weights is read once.
template <int R, typename Weights>
void dot_rows(Weights weights, int inputs, const int8_t* x, ptrdiff_t stride, int32_t* sums) {
  __m512i s[R][4];
  UNROLLED for (int r = 0; r < R; r++)
    UNROLLED for (int v = 0; v < 4; v++) s[r][v] = _mm512_loadu_si512(sums + r * kTile + v * 16);
  for (int k = 0; k < inputs; k += Weights::kInputs, weights.skip(Weights::kInputs)) {
    weights.prefetch();
    UNROLLED for (int four = 0; four < Weights::kInputs / 4; four++) {
      __m512i w[4];
      UNROLLED for (int v = 0; v < 4; v++) w[v] = weights.of(four, v);
      UNROLLED for (int r = 0; r < R; r++) {
        const __m512i in = four_inputs(x + r * stride + k + 4 * four);
        UNROLLED for (int v = 0; v < 4; v++) s[r][v] = _mm512_dpbusd_epi32(s[r][v], w[v], in);
      }
    }
  }
  UNROLLED for (int r = 0; r < R; r++)
    UNROLLED for (int v = 0; v < 4; v++) _mm512_storeu_si512(sums + r * kTile + v * 16, s[r][v]);
}

// More rows than registers have room for take the weights in pieces that stay in the first cache from one group of
// rows to the next, so that memory is read all the time.
template <typename Weights>
void dot_all(Weights weights, int inputs, const int8_t* x, ptrdiff_t stride, int rows, const int32_t* start,
             int32_t* sums) {
  constexpr int kMaxRows = 6, kPiece = 256;
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < 4; v++) _mm512_storeu_si512(sums + r * kTile + v * 16, _mm512_set1_epi32(start[r]));
  const int piece = rows <= kMaxRows ? inputs : kPiece;
  for (int k = 0; k < inputs; k += piece, weights.skip(piece)) {
    const int n = inputs - k < piece ? inputs - k : piece;
    for (int r = 0; r < rows; r += kMaxRows) {
      const int8_t* in = x + r * stride + k;
      int32_t* out = sums + r * kTile;
      switch (rows - r) {
        case 1: dot_rows<1>(weights, n, in, stride, out); break;
        case 2: dot_rows<2>(weights, n, in, stride, out); break;
        case 3: dot_rows<3>(weights, n, in, stride, out); break;
        case 4: dot_rows<4>(weights, n, in, stride, out); break;
        case 5: dot_rows<5>(weights, n, in, stride, out); break;
        default: dot_rows<kMaxRows>(weights, n, in, stride, out);
      }
    }
  }
}

void dot8(const uint8_t* tile, int inputs, const int8_t* x, ptrdiff_t stride, int rows, const int32_t* start,
          int32_t* sums) {
  if (matrix_unit && rows >= kGemmMinRows) return gemm(tile, inputs, x, stride, rows, start, sums);
  dot_all(Bytes{tile}, inputs, x, stride, rows, start, sums);
}

void dot8_planes(const uint8_t* hi, const uint8_t* lo, int inputs, const int8_t* x, ptrdiff_t stride, int rows,
                const int32_t* start, int32_t* sums) {
  dot_all(NibblePlanes{hi, lo}, inputs, x, stride, rows, start, sums);
}

void column8(const uint8_t* column, int inputs, const int8_t* x, ptrdiff_t stride, int rows, const int32_t* start,
             int32_t* sums) {
  for (int r = 0; r < rows; r++) {
    __m512i s = _mm512_set1_epi32(start[r]);
    for (int k = 0; k < inputs; k += 4)
      s = _mm512_dpbusd_epi32(s, _mm512_loadu_si512(column + k / 4 * kSliceBytes), four_inputs(x + r * stride + k));
    _mm512_storeu_si512(sums + r * kTile, s);
  }
}

// Prefetches a tile of 4 bits whose groups' scales or factors lie before its weights: into the second cache as one
// stream, from the far distance ahead of its first scale on, at one pace; into the first the weights and scales that come
// next. Scales of a tile that are asked for at once are more lines than the processor can wait for (docs/engine.md).
struct GroupsAhead {
  const uint8_t* far;

  INLINED void of_slice(const uint8_t* weights) {
    for (int line = 0; line < kSliceBytes; line += 64) {
      __builtin_prefetch(far + line, 0, 2);
      __builtin_prefetch(weights + ahead.near + line, 0, 3);
    }
    far += kSliceBytes;
  }
  INLINED void of_group(const void* scales, int bytes) {
    for (int line = 0; line < bytes; line += 64) {
      __builtin_prefetch(far + line, 0, 2);
      __builtin_prefetch((const uint8_t*)scales + 2 * bytes + line, 0, 3);
    }
    far += bytes;
  }
};

template <int M>
void dot4_tokens(const uint8_t* tile, const uint16_t* scale, bool elsewhere, int inputs, int group, const int8_t* x,
                 ptrdiff_t stride, const int32_t* group_sums, ptrdiff_t groups, float* sums) {
  constexpr int kScaleBytes = kTile * sizeof(uint16_t);
  GroupsAhead next = {(elsewhere ? tile : (const uint8_t*)scale) + ahead.far};
  const __m512i low = _mm512_set1_epi8(15);
  __m512 total[M][4];
  UNROLLED for (int m = 0; m < M; m++)
    UNROLLED for (int v = 0; v < 4; v++) total[m][v] = _mm512_setzero_ps();
  for (int k = 0, g = 0; k < inputs; g++) {
    __m512i s[2 * M][4];
    UNROLLED for (int r = 0; r < 2 * M; r++)
      UNROLLED for (int v = 0; v < 4; v++) s[r][v] = _mm512_setzero_si512();
    const int end = k + group < inputs ? k + group : inputs;
    for (; k < end; k += 8, tile += kSliceBytes) {
      next.of_slice(tile);
      UNROLLED for (int v = 0; v < 4; v++) {
        const __m512i both = _mm512_loadu_si512(tile + v * 64);
        const __m512i first = _mm512_and_si512(both, low);
        const __m512i second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        UNROLLED for (int r = 0; r < 2 * M; r++) {
          s[r][v] = _mm512_dpbusd_epi32(s[r][v], first, four_inputs(x + r * stride + k));
          s[r][v] = _mm512_dpbusd_epi32(s[r][v], second, four_inputs(x + r * stride + k + 4));
        }
      }
    }
    if (!elsewhere) next.of_group(scale + size_t(g) * kTile, kScaleBytes);
    UNROLLED for (int m = 0; m < M; m++) {
      const __m512i eights = _mm512_set1_epi32(group_sums[m * groups + g]);
      UNROLLED for (int v = 0; v < 4; v++) {
        const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(s[2 * m][v], 8), s[2 * m + 1][v]);
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(both, eights));
        total[m][v] = _mm512_fmadd_ps(sum, load_scales(scale + size_t(g) * kTile + v * 16), total[m][v]);
      }
    }
  }
  UNROLLED for (int m = 0; m < M; m++)
    UNROLLED for (int v = 0; v < 4; v++) _mm512_storeu_ps(sums + m * kTile + v * 16, total[m][v]);
}

void dot4(const uint8_t* tile, const uint16_t* scale, bool elsewhere, int inputs, int group, const int8_t* x,
          ptrdiff_t stride, int tokens, const int32_t* group_sums, float* sums) {
  const ptrdiff_t groups = (inputs + group - 1) / group;
  if (matrix_unit && 2 * tokens >= kGemm4MinRows && group % kUnitInputs == 0)
    return gemm4(tile, scale, inputs, group, x, stride, tokens, group_sums, sums);
  int m = 0;
  for (; m + 2 <= tokens; m += 2)
    dot4_tokens<2>(tile, scale, elsewhere, inputs, group, x + 2 * m * stride, stride, group_sums + m * groups, groups,
                   sums + m * kTile);
  if (m < tokens)
    dot4_tokens<1>(tile, scale, elsewhere, inputs, group, x + 2 * m * stride, stride, group_sums + m * groups, groups,
                   sums + m * kTile);
}

// R rows and V vectors of 16 outputs, from the first of which the pointers begin. Adds to the sums. What is prefetched
// begins at `far`, null for nothing.
template <int R, int V>
void dot4_factors_block(const uint8_t* part, const int8_t* factor, int inputs, int group, const int8_t* x,
                        ptrdiff_t stride, const int32_t* group_sums, ptrdiff_t groups, const uint8_t* far,
                        int32_t* sums) {
  GroupsAhead next = {far};
  const __m512i low = _mm512_set1_epi8(15);
  __m512i total[R][V];
  UNROLLED for (int r = 0; r < R; r++)
    UNROLLED for (int v = 0; v < V; v++) total[r][v] = _mm512_loadu_si512(sums + r * kTile + v * 16);
  for (int k = 0, g = 0; k < inputs; g++, factor += kTile) {
    __m512i s[R][V];
    UNROLLED for (int r = 0; r < R; r++) {
      const __m512i eights = _mm512_set1_epi32(-group_sums[r * groups + g]);
      UNROLLED for (int v = 0; v < V; v++) s[r][v] = eights;
    }
    const int end = k + group < inputs ? k + group : inputs;
    for (; k < end; k += 8, part += kSliceBytes) {
      if (far) next.of_slice(part);
      UNROLLED for (int v = 0; v < V; v++) {
        const __m512i both = _mm512_loadu_si512(part + v * 64);
        const __m512i first = _mm512_and_si512(both, low);
        const __m512i second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        UNROLLED for (int r = 0; r < R; r++) {
          s[r][v] = _mm512_dpbusd_epi32(s[r][v], first, four_inputs(x + r * stride + k));
          s[r][v] = _mm512_dpbusd_epi32(s[r][v], second, four_inputs(x + r * stride + k + 4));
        }
      }
    }
    if (far) next.of_group(factor, kTile);
    UNROLLED for (int v = 0; v < V; v++) {
      const __m512i factors = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(factor + v * 16)));
      UNROLLED for (int r = 0; r < R; r++)
        total[r][v] = _mm512_add_epi32(total[r][v], _mm512_mullo_epi32(s[r][v], factors));
    }
  }
  UNROLLED for (int r = 0; r < R; r++)
    UNROLLED for (int v = 0; v < V; v++) _mm512_storeu_si512(sums + r * kTile + v * 16, total[r][v]);
}

template <int R, int V>
void dot4_factors_rows(const uint8_t* tile, const int8_t* factor, int inputs, int group, const int8_t* x,
                       ptrdiff_t stride, const int32_t* group_sums, ptrdiff_t groups, const uint8_t* far,
                       int32_t* sums) {
  for (int v = 0; v < 4; v += V)
    dot4_factors_block<R, V>(tile + v * 64, factor + v * 16, inputs, group, x, stride, group_sums, groups,
                             v == 0 ? far : nullptr, sums + v * 16);
}

void dot4_factors(const uint8_t* tile, const int8_t* factor, int inputs, int group, const int8_t* x, ptrdiff_t stride,
                  int rows, const int32_t* group_sums, int32_t* sums) {
  constexpr int kMaxRows = 6, kPiece = 512;  // inputs whose nibbles stay in the first cache
  const ptrdiff_t groups = (inputs + group - 1) / group;
  if (matrix_unit && rows >= kGemm4MinRows)
    return gemm4_factors(tile, factor, inputs, group, x, stride, rows, group_sums, sums);
  memset(sums, 0, size_t(rows) * kTile * sizeof(int32_t));
  const int piece = rows <= 2 ? inputs : group < kPiece ? kPiece / group * group : group;
  for (int k = 0; k < inputs; k += piece) {
    const int n = inputs - k < piece ? inputs - k : piece;
    const ptrdiff_t g = k / group;
    for (int r = 0; r < rows; r += kMaxRows) {
      const int8_t* in = x + r * stride + k;
      const int32_t* eights = group_sums + r * groups + g;
      const uint8_t* part = tile + size_t(k) / 8 * kSliceBytes;
      const int8_t* factors = factor + g * kTile;
      int32_t* out = sums + r * kTile;
      const uint8_t* far = r == 0 ? (const uint8_t*)factor + g * kTile + size_t(k) / 8 * kSliceBytes + ahead.far : nullptr;
      switch (rows - r) {
        case 1: dot4_factors_rows<1, 4>(part, factors, n, group, in, stride, eights, groups, far, out); break;
        case 2: dot4_factors_rows<2, 4>(part, factors, n, group, in, stride, eights, groups, far, out); break;
        case 3: dot4_factors_rows<3, 2>(part, factors, n, group, in, stride, eights, groups, far, out); break;
        case 4: dot4_factors_rows<4, 2>(part, factors, n, group, in, stride, eights, groups, far, out); break;
        case 5: dot4_factors_rows<5, 2>(part, factors, n, group, in, stride, eights, groups, far, out); break;
        default: dot4_factors_rows<kMaxRows, 2>(part, factors, n, group, in, stride, eights, groups, far, out);
      }
    }
  }
}

uint64_t read_all(const uint8_t* bytes, size_t n) {
  __m512i seen[4] = {};
  for (size_t i = 0; i < n; i += kSliceBytes) {
    prefetch_weights<kSliceBytes>(bytes + i, ahead);
    for (int v = 0; v < 4; v++) seen[v] = _mm512_xor_si512(seen[v], _mm512_loadu_si512(bytes + i + v * 64));
  }
  uint64_t lanes[8];
  _mm512_storeu_si512(lanes, _mm512_xor_si512(_mm512_xor_si512(seen[0], seen[1]), _mm512_xor_si512(seen[2], seen[3])));
  for (int l = 1; l < 8; l++) lanes[0] ^= lanes[l];
  return lanes[0];
}

}  // namespace

const Kernels* avx512_kernels() {
  static const Kernels kernels = [] {
    // A Zen 5 reads 4 bits a quarter faster where a line goes on into the first cache soon after the second has it.
    if (is_zen5()) ahead.near = 7680;
    Kernels k = float_kernels("avx512-vnni");
    k.prefetch = ahead;
    k.dot8 = dot8;
    matrix_unit = has_matrix_unit();
    k.planes_max_rows = matrix_unit ? kGemmMinRows - 1 : Kernels::kAnyRows;
    k.dot8_planes = dot8_planes;
    k.column8 = column8;
    k.prefetches_groups = true;
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
