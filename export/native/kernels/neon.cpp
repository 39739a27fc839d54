// NEON with the dot product instruction: four products of signed bytes a lane, added without saturation.
//
// The instruction wants both sides signed, so the bytes of a tile, integer + 128, are made signed again (their highest
// bit flips), and sums start 128 sum(x) higher. Nibbles are 0 to 15 and serve as they are.
#include "kernels/kernels.h"

#if defined(__aarch64__)

#include <arm_neon.h>
#include <math.h>
#include <string.h>

#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

namespace {

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef double Doubles __attribute__((vector_size(16)));
struct Half {
  uint16_t bits;
};

inline Floats vmax(Floats a, Floats b) {
  return (Floats)vbslq_f32(vcgtq_f32((float32x4_t)a, (float32x4_t)b), (float32x4_t)a, (float32x4_t)b);
}
inline Floats vmin(Floats a, Floats b) {
  return (Floats)vbslq_f32(vcltq_f32((float32x4_t)a, (float32x4_t)b), (float32x4_t)a, (float32x4_t)b);
}
inline Doubles vmax(Doubles a, Doubles b) {
  return (Doubles)vbslq_f64(vcgtq_f64((float64x2_t)a, (float64x2_t)b), (float64x2_t)a, (float64x2_t)b);
}
inline Doubles vmin(Doubles a, Doubles b) {
  return (Doubles)vbslq_f64(vcltq_f64((float64x2_t)a, (float64x2_t)b), (float64x2_t)a, (float64x2_t)b);
}
inline Doubles mul_add(Doubles a, Doubles b, Doubles c) {
  return (Doubles)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
inline Doubles load_doubles(const float* p) { return (Doubles)vcvt_f64_f32(vld1_f32(p)); }
inline Doubles load_doubles(const Half* p) {
  uint32_t two;
  memcpy(&two, p, 4);
  const float16x4_t halves = vreinterpret_f16_u32(vdup_n_u32(two));
  return (Doubles)vcvt_f64_f32(vget_low_f32(vcvt_f32_f16(halves)));
}
inline Doubles load_doubles(const int8_t* p) { return Doubles{double(p[0]), double(p[1])}; }
inline Floats mul_add(Floats a, Floats b, Floats c) {
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
inline Floats load_floats(const Half* p) {
  return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p)));
}
inline Floats load_floats(const int32_t* p) { return (Floats)vcvtq_f32_s32(vld1q_s32(p)); }
inline void store(float* p, Doubles v) { vst1_f32(p, vcvt_f32_f64((float64x2_t)v)); }
inline void store(int8_t* p, Ints v) {
  const int16x4_t words = vmovn_s32((int32x4_t)v);
  const int32_t four = vget_lane_s32(vreinterpret_s32_s8(vmovn_s16(vcombine_s16(words, words))), 0);
  memcpy(p, &four, 4);
}
inline void store_element(Half* p, float x) {
  p->bits = vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(x))), 0);
}
constexpr int kAccumulators = 16, kSumVectors = 4, kQueries = 4;

#include "kernels/floats.inl"
#include "kernels/float_weights.inl"
#include "kernels/attention.inl"

constexpr int kAhead = 1536;  // bytes; not tuned, as no such processor was at hand
constexpr int kVectors = kSliceBytes / 16;  // of a slice: 4 outputs each

template <int V>
INLINED void prefetch_vectors(const uint8_t* p) {
  for (int line = 0; line < V * 16; line += 64) __builtin_prefetch(p + kAhead + line);
}

inline int32_t sum_bytes(const int8_t* x, int n) {  // n is a multiple of 16
  const int8x16_t ones = vdupq_n_s8(1);
  int32x4_t sum = vdupq_n_s32(0);
  for (int i = 0; i < n; i += 16) sum = vdotq_s32(sum, vld1q_s8(x + i), ones);
  return vaddvq_s32(sum);
}

// Adds one slice, the inputs of one lane of x, to the sums of R rows and 4 V outputs.
template <int Lane, int R, int V>
inline __attribute__((always_inline)) void add_slice(const uint8_t* slice, const int8x16_t (&x)[R],
                                                    int32x4_t (&s)[R][V]) {
  prefetch_vectors<V>(slice);
  for (int v = 0; v < V; v++) {
    const int8x16_t w = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(slice + v * 16), vdupq_n_u8(128)));
    for (int r = 0; r < R; r++) s[r][v] = vdotq_laneq_s32(s[r][v], w, x[r], Lane);
  }
}

// R rows, 4 V outputs from `part` on.
template <int R, int V>
void dot8_part(const uint8_t* part, int inputs, const int8_t* x, ptrdiff_t stride, const int32_t* start,
               int32_t* sums) {
  int32x4_t s[R][V];
  for (int r = 0; r < R; r++) {
    const int32x4_t first = vdupq_n_s32(start[r] + 128 * sum_bytes(x + r * stride, inputs));
    for (int v = 0; v < V; v++) s[r][v] = first;
  }
  for (int k = 0; k < inputs; k += 16, part += 4 * kSliceBytes) {
    int8x16_t in[R];
    for (int r = 0; r < R; r++) in[r] = vld1q_s8(x + r * stride + k);
    add_slice<0>(part, in, s);
    add_slice<1>(part + kSliceBytes, in, s);
    add_slice<2>(part + 2 * kSliceBytes, in, s);
    add_slice<3>(part + 3 * kSliceBytes, in, s);
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) vst1q_s32(sums + r * kTile + v * 4, s[r][v]);
}

// R rows: 16 vectors of sums stay in registers, so the more rows, the fewer outputs at once.
template <int R>
void dot8_rows(const uint8_t* tile, int inputs, const int8_t* x, ptrdiff_t stride, const int32_t* start,
               int32_t* sums) {
  constexpr int V = kVectors / R;
  for (int v = 0; v < kVectors; v += V) dot8_part<R, V>(tile + v * 16, inputs, x, stride, start, sums + v * 4);
}

void dot8(const uint8_t* tile, int inputs, const int8_t* x, ptrdiff_t stride, int rows, const int32_t* start,
          int32_t* sums) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) dot8_rows<4>(tile, inputs, x + r * stride, stride, start + r, sums + r * kTile);
  for (; r + 2 <= rows; r += 2) dot8_rows<2>(tile, inputs, x + r * stride, stride, start + r, sums + r * kTile);
  if (r < rows) dot8_rows<1>(tile, inputs, x + r * stride, stride, start + r, sums + r * kTile);
}

void column8(const uint8_t* column, int inputs, const int8_t* x, ptrdiff_t stride, int rows, const int32_t* start,
             int32_t* sums) {
  for (int r = 0; r < rows; r++)
    dot8_part<1, 4>(column, inputs, x + r * stride, stride, start + r, sums + r * kTile);
}

inline float32x4_t load_scales(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }

// M tokens, 4 V outputs from `part` on; `scale` is theirs.
template <int M, int V>
void dot4_part(const uint8_t* part, const uint16_t* scale, int inputs, int group, const int8_t* x, ptrdiff_t stride,
               const int32_t* group_sums, ptrdiff_t groups, float* sums) {
  float32x4_t total[M][V] = {};
  for (int k = 0, g = 0; k < inputs; g++, scale += kTile) {
    int32x4_t s[2 * M][V] = {};
    const int end = k + group < inputs ? k + group : inputs;
    for (; k < end; k += 8, part += kSliceBytes) {
      prefetch_vectors<V>(part);
      int8x8_t in[2 * M];
      for (int r = 0; r < 2 * M; r++) in[r] = vld1_s8(x + r * stride + k);
      for (int v = 0; v < V; v++) {
        const uint8x16_t both = vld1q_u8(part + v * 16);
        const int8x16_t first = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
        const int8x16_t second = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
        for (int r = 0; r < 2 * M; r++) {
          s[r][v] = vdotq_lane_s32(s[r][v], first, in[r], 0);
          s[r][v] = vdotq_lane_s32(s[r][v], second, in[r], 1);
        }
      }
    }
    for (int m = 0; m < M; m++) {
      const int32x4_t eights = vdupq_n_s32(group_sums[m * groups + g]);
      for (int v = 0; v < V; v++) {
        const int32x4_t both = vaddq_s32(vshlq_n_s32(s[2 * m][v], 8), s[2 * m + 1][v]);
        total[m][v] = vfmaq_f32(total[m][v], vcvtq_f32_s32(vsubq_s32(both, eights)), load_scales(scale + v * 4));
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) vst1q_f32(sums + m * kTile + v * 4, total[m][v]);
}

// M tokens, two rows each: 16 vectors of integer sums stay in registers.
template <int M>
void dot4_tokens(const uint8_t* tile, const uint16_t* scale, int inputs, int group, const int8_t* x, ptrdiff_t stride,
                 const int32_t* group_sums, ptrdiff_t groups, float* sums) {
  constexpr int V = kVectors / (2 * M);
  for (int v = 0; v < kVectors; v += V)
    dot4_part<M, V>(tile + v * 16, scale + v * 4, inputs, group, x, stride, group_sums, groups, sums + v * 4);
}

void dot4(const uint8_t* tile, const uint16_t* scale, bool, int inputs, int group, const int8_t* x, ptrdiff_t stride,
          int tokens, const int32_t* group_sums, float* sums) {
  const ptrdiff_t groups = (inputs + group - 1) / group;
  int m = 0;
  for (; m + 2 <= tokens; m += 2)
    dot4_tokens<2>(tile, scale, inputs, group, x + 2 * m * stride, stride, group_sums + m * groups, groups,
                   sums + m * kTile);
  if (m < tokens)
    dot4_tokens<1>(tile, scale, inputs, group, x + 2 * m * stride, stride, group_sums + m * groups, groups,
                   sums + m * kTile);
}

// R rows, 4 V outputs from `part` on; `factor` is theirs.
template <int R, int V>
void dot4_factors_part(const uint8_t* part, const int8_t* factor, int inputs, int group, const int8_t* x,
                       ptrdiff_t stride, const int32_t* group_sums, ptrdiff_t groups, int32_t* sums) {
  int32x4_t total[R][V] = {};
  for (int k = 0, g = 0; k < inputs; g++, factor += kTile) {
    int32x4_t s[R][V];
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) s[r][v] = vdupq_n_s32(-group_sums[r * groups + g]);
    const int end = k + group < inputs ? k + group : inputs;
    for (; k < end; k += 8, part += kSliceBytes) {
      prefetch_vectors<V>(part);
      int8x8_t in[R];
      for (int r = 0; r < R; r++) in[r] = vld1_s8(x + r * stride + k);
      for (int v = 0; v < V; v++) {
        const uint8x16_t both = vld1q_u8(part + v * 16);
        const int8x16_t first = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
        const int8x16_t second = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
        for (int r = 0; r < R; r++) {
          s[r][v] = vdotq_lane_s32(s[r][v], first, in[r], 0);
          s[r][v] = vdotq_lane_s32(s[r][v], second, in[r], 1);
        }
      }
    }
    for (int v = 0; v < V; v++) {
      int32_t four;
      memcpy(&four, factor + v * 4, 4);
      const int32x4_t factors = vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))));
      for (int r = 0; r < R; r++) total[r][v] = vmlaq_s32(total[r][v], s[r][v], factors);
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) vst1q_s32(sums + r * kTile + v * 4, total[r][v]);
}

// R rows: 8 vectors of integer sums and 8 of totals stay in registers.
template <int R>
void dot4_factors_rows(const uint8_t* tile, const int8_t* factor, int inputs, int group, const int8_t* x,
                       ptrdiff_t stride, const int32_t* group_sums, ptrdiff_t groups, int32_t* sums) {
  constexpr int V = kVectors / 2 / R;
  for (int v = 0; v < kVectors; v += V)
    dot4_factors_part<R, V>(tile + v * 16, factor + v * 4, inputs, group, x, stride, group_sums, groups, sums + v * 4);
}

void dot4_factors(const uint8_t* tile, const int8_t* factor, int inputs, int group, const int8_t* x, ptrdiff_t stride,
                  int rows, const int32_t* group_sums, int32_t* sums) {
  const ptrdiff_t groups = (inputs + group - 1) / group;
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    dot4_factors_rows<4>(tile, factor, inputs, group, x + r * stride, stride, group_sums + r * groups, groups,
                         sums + r * kTile);
  for (; r < rows; r++)
    dot4_factors_rows<1>(tile, factor, inputs, group, x + r * stride, stride, group_sums + r * groups, groups,
                         sums + r * kTile);
}

uint64_t read_all(const uint8_t* bytes, size_t n) {
  uint8x16_t seen[kVectors] = {};
  for (size_t i = 0; i < n; i += kSliceBytes) {
    prefetch_vectors<kVectors>(bytes + i);
    for (int v = 0; v < kVectors; v++) seen[v] = veorq_u8(seen[v], vld1q_u8(bytes + i + v * 16));
  }
  for (int v = 1; v < kVectors; v++) seen[0] = veorq_u8(seen[0], seen[v]);
  const uint64x2_t last = vreinterpretq_u64_u8(seen[0]);
  return vgetq_lane_u64(last, 0) ^ vgetq_lane_u64(last, 1);
}

bool has_dot_product() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__APPLE__)
  return true;  // every Mac of this architecture
#else
  return false;
#endif
}

}  // namespace

const Kernels* neon_kernels() {
  static const Kernels kernels = [] {
    Kernels k = float_kernels("neon-dotprod");
    k.prefetch = {kAhead, kAhead};
    k.dot8 = dot8;
    k.column8 = column8;
    k.dot4 = dot4;
    k.dot4_factors = dot4_factors;
    k.read = read_all;
    return k;
  }();
  return has_dot_product() ? &kernels : nullptr;
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
