// Plain C++ for any processor: what the others must agree with, and slow.
#include <math.h>
#include <string.h>

#include "kernels/kernels.h"

namespace {

#include "kernels/plain.inl"

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef double Doubles __attribute__((vector_size(16)));
struct Half {
  uint16_t bits;
};

inline Floats vmax(Floats a, Floats b) { return a > b ? a : b; }
inline Floats vmin(Floats a, Floats b) { return a < b ? a : b; }
inline Doubles vmax(Doubles a, Doubles b) { return a > b ? a : b; }
inline Doubles vmin(Doubles a, Doubles b) { return a < b ? a : b; }
inline Doubles mul_add(Doubles a, Doubles b, Doubles c) { return a * b + c; }
inline Doubles load_doubles(const float* p) { return Doubles{p[0], p[1]}; }
inline Doubles load_doubles(const Half* p) { return Doubles{half_to_f32(p[0].bits), half_to_f32(p[1].bits)}; }
inline Doubles load_doubles(const int8_t* p) { return Doubles{double(p[0]), double(p[1])}; }
inline Floats mul_add(Floats a, Floats b, Floats c) { return a * b + c; }
inline Floats load_floats(const Half* p) {
  return Floats{half_to_f32(p[0].bits), half_to_f32(p[1].bits), half_to_f32(p[2].bits), half_to_f32(p[3].bits)};
}
inline Floats load_floats(const int32_t* p) { return Floats{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
inline void store(float* p, Doubles v) {
  for (int i = 0; i < 2; i++) p[i] = (float)v[i];
}
inline void store(int8_t* p, Ints v) {
  for (int i = 0; i < 4; i++) p[i] = (int8_t)v[i];
}
inline void store_element(Half* p, float x) { p->bits = f32_to_half(x); }
constexpr int kAccumulators = 8, kSumVectors = 2, kQueries = 4;

#include "kernels/floats.inl"
#include "kernels/float_weights.inl"
#include "kernels/attention.inl"

void dot8(const uint8_t* tile, int inputs, const int8_t* x, ptrdiff_t stride, int rows, const int32_t* start,
          int32_t* sums) {
  for (int r = 0; r < rows; r++) {
    int32_t* s = sums + r * kTile;
    const uint8_t* slice = tile;
    for (int o = 0; o < kTile; o++) s[o] = start[r];
    for (int k = 0; k < inputs; k += 4, slice += kSliceBytes) {
      const int8_t* in = x + r * stride + k;
      for (int o = 0; o < kTile; o++)
        s[o] += slice[o * 4] * in[0] + slice[o * 4 + 1] * in[1] + slice[o * 4 + 2] * in[2] + slice[o * 4 + 3] * in[3];
    }
  }
}

void column8(const uint8_t* column, int inputs, const int8_t* x, ptrdiff_t stride, int rows, const int32_t* start,
             int32_t* sums) {
  for (int r = 0; r < rows; r++)
    for (int o = 0; o < 16; o++) {
      int32_t s = start[r];
      for (int k = 0; k < inputs; k++) s += column[k / 4 * kSliceBytes + o * 4 + k % 4] * x[r * stride + k];
      sums[r * kTile + o] = s;
    }
}

void dot4(const uint8_t* tile, const uint16_t* scale, bool, int inputs, int group, const int8_t* x, ptrdiff_t stride,
          int tokens, const int32_t* group_sums, float* sums) {
  for (int m = 0; m < tokens; m++) {
    const int8_t* rows = x + 2 * m * stride;
    const uint8_t* slice = tile;
    float* total = sums + m * kTile;
    for (int o = 0; o < kTile; o++) total[o] = 0;
    for (int k = 0, g = 0; k < inputs; g++) {
      int32_t s[kTile] = {};
      const int end = k + group < inputs ? k + group : inputs;
      for (; k < end; k += 8, slice += kSliceBytes)
        for (int o = 0; o < kTile; o++)
          for (int j = 0; j < 4; j++) {
            const int first = slice[o * 4 + j] & 15, second = slice[o * 4 + j] >> 4;
            s[o] += first * (rows[k + j] * 256 + rows[stride + k + j]);
            s[o] += second * (rows[k + 4 + j] * 256 + rows[stride + k + 4 + j]);
          }
      for (int o = 0; o < kTile; o++)
        total[o] += float(s[o] - group_sums[g]) * bf16_to_f32(scale[size_t(g) * kTile + o]);
    }
    group_sums += (inputs + group - 1) / group;
  }
}

void dot4_factors(const uint8_t* tile, const int8_t* factor, int inputs, int group, const int8_t* x, ptrdiff_t stride,
                  int rows, const int32_t* group_sums, int32_t* sums) {
  for (int r = 0; r < rows; r++, x += stride) {
    const uint8_t* slice = tile;
    int32_t* total = sums + r * kTile;
    for (int o = 0; o < kTile; o++) total[o] = 0;
    for (int k = 0, g = 0; k < inputs; g++, group_sums++) {
      int32_t s[kTile] = {};
      const int end = k + group < inputs ? k + group : inputs;
      for (; k < end; k += 8, slice += kSliceBytes)
        for (int o = 0; o < kTile; o++)
          for (int j = 0; j < 4; j++)
            s[o] += (slice[o * 4 + j] & 15) * x[k + j] + (slice[o * 4 + j] >> 4) * x[k + 4 + j];
      for (int o = 0; o < kTile; o++) total[o] += (s[o] - *group_sums) * factor[g * kTile + o];
    }
  }
}

uint64_t read_all(const uint8_t* bytes, size_t n) {
  uint64_t seen[8] = {};
  for (size_t i = 0; i < n; i += 64)
    for (int v = 0; v < 8; v++) {
      uint64_t eight;
      memcpy(&eight, bytes + i + v * 8, 8);
      seen[v] ^= eight;
    }
  for (int v = 1; v < 8; v++) seen[0] ^= seen[v];
  return seen[0];
}

}  // namespace

const Kernels* portable_kernels() {
  static const Kernels kernels = [] {
    Kernels k = float_kernels("portable");
    k.prefetch = {0, 0};
    k.dot8 = dot8;
    k.column8 = column8;
    k.dot4 = dot4;
    k.dot4_factors = dot4_factors;
    k.read = read_all;
    return k;
  }();
  return &kernels;
}
