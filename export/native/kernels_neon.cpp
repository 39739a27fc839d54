// NEON with the dot product instruction: four products of signed bytes a lane, added without saturation.
//
// The instruction wants both sides signed, so the bytes of a tile, integer + 128, are turned back (their highest
// bit flips), and sums start 128 sum(x) higher. Half bytes are 0 to 15 and serve as they are.
#include "kernels.h"

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

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));
struct Half {
  uint16_t bits;
};
union Parts {
  Floats all;
  float32x4_t quarter[4];
};
union IntParts {
  Ints all;
  int32x4_t quarter[4];
};
union DoubleParts {
  Doubles all;
  float64x2_t quarter[4];
};

inline Floats fma16(const Floats& a, const Floats& b, const Floats& c) {
  Parts x = {a}, y = {b}, z = {c};
  for (int h = 0; h < 4; h++) z.quarter[h] = vfmaq_f32(z.quarter[h], x.quarter[h], y.quarter[h]);
  return z.all;
}
inline Floats max16(const Floats& a, const Floats& b) {
  Parts x = {a}, y = {b};
  for (int h = 0; h < 4; h++)
    x.quarter[h] = vbslq_f32(vcgtq_f32(x.quarter[h], y.quarter[h]), x.quarter[h], y.quarter[h]);
  return x.all;
}
inline Floats min16(const Floats& a, const Floats& b) {
  Parts x = {a}, y = {b};
  for (int h = 0; h < 4; h++)
    x.quarter[h] = vbslq_f32(vcltq_f32(x.quarter[h], y.quarter[h]), x.quarter[h], y.quarter[h]);
  return x.all;
}
inline Doubles fma8(const Doubles& a, const Doubles& b, const Doubles& c) {
  DoubleParts x = {a}, y = {b}, z = {c};
  for (int h = 0; h < 4; h++) z.quarter[h] = vfmaq_f64(z.quarter[h], x.quarter[h], y.quarter[h]);
  return z.all;
}
inline Doubles max8(const Doubles& a, const Doubles& b) {
  DoubleParts x = {a}, y = {b};
  for (int h = 0; h < 4; h++)
    x.quarter[h] = vbslq_f64(vcgtq_f64(x.quarter[h], y.quarter[h]), x.quarter[h], y.quarter[h]);
  return x.all;
}
inline Doubles min8(const Doubles& a, const Doubles& b) {
  DoubleParts x = {a}, y = {b};
  for (int h = 0; h < 4; h++)
    x.quarter[h] = vbslq_f64(vcltq_f64(x.quarter[h], y.quarter[h]), x.quarter[h], y.quarter[h]);
  return x.all;
}
inline Doubles load8(const float* p) {
  DoubleParts v;
  for (int h = 0; h < 4; h++) v.quarter[h] = vcvt_f64_f32(vld1_f32(p + 2 * h));
  return v.all;
}
inline Doubles load8(const Half* p) {
  DoubleParts v;
  for (int h = 0; h < 2; h++) {
    const float32x4_t floats = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p[4 * h].bits)));
    v.quarter[2 * h] = vcvt_f64_f32(vget_low_f32(floats));
    v.quarter[2 * h + 1] = vcvt_high_f64_f32(floats);
  }
  return v.all;
}
inline Doubles load8(const int8_t* p) {
  Doubles v;
  for (int i = 0; i < 8; i++) v[i] = p[i];
  return v;
}
inline void store8(float* p, const Doubles& v) {
  DoubleParts parts = {v};
  for (int h = 0; h < 4; h++) vst1_f32(p + 2 * h, vcvt_f32_f64(parts.quarter[h]));
}
constexpr int kSums = 4;
inline Floats load16(const Half* p) {
  Parts v;
  for (int h = 0; h < 4; h++) v.quarter[h] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p[4 * h].bits)));
  return v.all;
}
inline Floats load16(const int8_t* p) {
  const int8x16_t bytes = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
  Parts v;
  v.quarter[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
  v.quarter[1] = vcvtq_f32_s32(vmovl_high_s16(low));
  v.quarter[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)));
  v.quarter[3] = vcvtq_f32_s32(vmovl_high_s16(high));
  return v.all;
}
inline Floats to_floats(const int32_t* p) {
  Parts v;
  for (int h = 0; h < 4; h++) v.quarter[h] = vcvtq_f32_s32(vld1q_s32(p + 4 * h));
  return v.all;
}
inline void store16(int8_t* p, const Ints& v) {
  const IntParts parts = {v};
  const int16x8_t low = vmovn_high_s32(vmovn_s32(parts.quarter[0]), parts.quarter[1]);
  const int16x8_t high = vmovn_high_s32(vmovn_s32(parts.quarter[2]), parts.quarter[3]);
  vst1q_s8(p, vmovn_high_s16(vmovn_s16(low), high));
}
inline void put(Half* p, float x) {
  p->bits = vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(x))), 0);
}

#include "floats.inl"

constexpr int kAhead = 1536;
constexpr int kVectors = kStepBytes / 16;  // of a step: 4 outputs each

template <int V>
inline void ask_ahead(const uint8_t* p) {
  for (int line = 0; line < V * 16; line += 64) __builtin_prefetch(p + kAhead + line);
}

inline int32_t sum_bytes(const int8_t* x, int n) {  // n is a multiple of 16
  const int8x16_t ones = vdupq_n_s8(1);
  int32x4_t sum = vdupq_n_s32(0);
  for (int i = 0; i < n; i += 16) sum = vdotq_s32(sum, vld1q_s8(x + i), ones);
  return vaddvq_s32(sum);
}

// Adds one step, the inputs of one lane of x, to the sums of R rows and 4 V outputs.
template <int Lane, int R, int V>
inline __attribute__((always_inline)) void add_step(const uint8_t* step, const int8x16_t (&x)[R],
                                                    int32x4_t (&s)[R][V]) {
  ask_ahead<V>(step);
  for (int v = 0; v < V; v++) {
    const int8x16_t w = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(step + v * 16), vdupq_n_u8(128)));
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
  for (int k = 0; k < inputs; k += 16, part += 4 * kStepBytes) {
    int8x16_t in[R];
    for (int r = 0; r < R; r++) in[r] = vld1q_s8(x + r * stride + k);
    add_step<0>(part, in, s);
    add_step<1>(part + kStepBytes, in, s);
    add_step<2>(part + 2 * kStepBytes, in, s);
    add_step<3>(part + 3 * kStepBytes, in, s);
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

inline float32x4_t steps4(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }

// M tokens, 4 V outputs from `part` on; `scale` is theirs.
template <int M, int V>
void dot4_part(const uint8_t* part, const uint16_t* scale, int inputs, int group, const int8_t* x, ptrdiff_t stride,
               const int32_t* group_sums, ptrdiff_t groups, float* sums) {
  float32x4_t total[M][V] = {};
  for (int k = 0, g = 0; k < inputs; g++, scale += kTile) {
    int32x4_t s[2 * M][V] = {};
    const int end = k + group < inputs ? k + group : inputs;
    for (; k < end; k += 8, part += kStepBytes) {
      ask_ahead<V>(part);
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
        total[m][v] = vfmaq_f32(total[m][v], vcvtq_f32_s32(vsubq_s32(both, eights)), steps4(scale + v * 4));
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

void dot4(const uint8_t* tile, const uint16_t* scale, int inputs, int group, const int8_t* x, ptrdiff_t stride,
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

uint64_t read_all(const uint8_t* bytes, size_t n) {
  uint8x16_t seen[kVectors] = {};
  for (size_t i = 0; i < n; i += kStepBytes) {
    ask_ahead<kVectors>(bytes + i);
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
  static const Kernels kernels = {
      "neon-dotprod", 0, dot8, nullptr, nullptr, join, column8, dot4, layer_norm, quantize, sum_groups, gelu, finish8, finish4, add,
      remember, attend, ask_for, fold, largest, bounds, most, read_all,
  };
  return has_dot_product() ? &kernels : nullptr;
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
