// The table of functions that each instruction set fills: the loops that a step spends its time in.
#pragma once

#include "tiles/layout.h"

// Before a loop of at most 8 rounds, a constant number, whose array is to lie in registers: without it GCC 12 writes
// every element back to memory in each round of the loop around it.
#define UNROLLED _Pragma("GCC unroll 8")

// Inlined at once: GCC takes a function that only prefetches for one that does nothing, and drops calls of it.
#define INLINED inline __attribute__((always_inline))

// How many bytes ahead weights are prefetched: into the second cache, and into the first. docs/engine.md has the speeds
// of other distances.
struct Prefetch {
  ptrdiff_t far, near;
};
constexpr Prefetch kUsualPrefetch = {8192, 2048};

// Prefetches what lies ahead of p; streams that are read side by side share the distance.
template <int Bytes, int Streams = 1>
INLINED void prefetch_weights(const uint8_t* p, Prefetch ahead = kUsualPrefetch) {
  for (int line = 0; line < Bytes; line += 64) {
    __builtin_prefetch(p + ahead.far / Streams + line, 0, 2);
    __builtin_prefetch(p + ahead.near / Streams + line, 0, 3);
  }
}

// A layer's keys and values of one slot and head, in blocks of 64 positions. Dp is the head size padded to 16.
//   keys     [4][Dp][16]   16 positions side by side, so that scores are computed without sums across lanes
//   values   [64][Dp]
// The same head's next block is `stride` bytes further on: between them lie the other heads and layers, so that a
// text touches no more memory than it has positions, and few large pages.
// Elements are float, float16 or int8; int8 ones have a scale for each position (64 of a block).
constexpr int kBlock = 64;
constexpr int kMaxQueries = 8;  // of a text that attend together

struct HeadCache {
  uint8_t* keys;
  uint8_t* values;
  uint8_t* key_scale;
  uint8_t* value_scale;
  size_t stride;
  ptrdiff_t next_offset = 0;  // bytes from here to the cache that is attended to next, for its prefetch; 0: none
};

struct Kernels {
  const char* name = nullptr;
  Prefetch prefetch = kUsualPrefetch;  // of integer weights; zeros where there is none
  // Whether dot4 and dot4_factors prefetch the scales and factors of the groups as well.
  bool prefetches_groups = false;

  // ---- products; `x` has rows of integers, `stride` apart

  // sums[r][64] = start[r] + sum_k tile[o][k] x[r][k]; exact.
  void (*dot8)(const uint8_t* tile, int inputs, const int8_t* x, ptrdiff_t stride, int rows, const int32_t* start,
               int32_t* sums) = nullptr;
  // dot8 of a tile in nibble planes, for up to planes_max_rows rows; beyond them it is as quick to merge them before.
  void (*dot8_planes)(const uint8_t* hi, const uint8_t* lo, int inputs, const int8_t* x, ptrdiff_t stride, int rows,
                      const int32_t* start, int32_t* sums) = nullptr;
  static constexpr int kAnyRows = 1 << 30;
  int planes_max_rows = 0;
  // Makes a tile of 8 bits of nibble planes: the bytes of `outputs` outputs from `first` on, the others stay.
  void (*merge_planes)(const uint8_t* hi, const uint8_t* lo, int inputs, int first, int outputs,
                       uint8_t* tile) = nullptr;
  // dot8 of 16 outputs; `column` is the tile's start + 64 times which 16 they are; sums lie as dot8's.
  void (*column8)(const uint8_t* column, int inputs, const int8_t* x, ptrdiff_t stride, int rows, const int32_t* start,
                  int32_t* sums) = nullptr;
  // Rows come in pairs (an input's integers and its residual's): sums[m][64] = sum over groups of scale[g][o] times
  // sum_k q[o][k] (256 x[2 m][k] + x[2 m + 1][k]). group_sums[m][g] = 8 sum_k (256 x[2 m][k] + x[2 m + 1][k]).
  // Scales are bfloat16. They lie right before the weights, unless they are `elsewhere`.
  void (*dot4)(const uint8_t* tile, const uint16_t* scale, bool elsewhere, int inputs, int group, const int8_t* x,
               ptrdiff_t stride, int tokens, const int32_t* group_sums, float* sums) = nullptr;

  // Weights of 4 bits whose groups have whole factors: sums[r][64] = sum over groups of factor[g][o] times sum_k q[o][k]
  // x[r][k]; exact. group_sums[r][g] = 8 sum_k x[r][k]. Factors lie right before the weights.
  void (*dot4_factors)(const uint8_t* tile, const int8_t* factor, int inputs, int group, const int8_t* x,
                       ptrdiff_t stride, int rows, const int32_t* group_sums, int32_t* sums) = nullptr;
  // sums[r][64] = bias[o] + sum_k tile[k][o] x[r][k], in the order of k; bias may be null. Weights are float32, or
  // float16, which are floats before they are multiplied.
  void (*dot_float32)(const float* tile, int inputs, const float* x, ptrdiff_t stride, int rows, const float* bias,
                      float* sums) = nullptr;
  void (*dot_float16)(const uint16_t* tile, int inputs, const float* x, ptrdiff_t stride, int rows, const float* bias,
                      float* sums) = nullptr;

  // ---- loops over floats

  void (*layer_norm)(const float* x, const float* gain, const float* bias, int n, float* y) = nullptr;
  // Quantizes a row (see model/arithmetic.py); q, and residual where it is not null, get zeros up to padded(n).
  // static_scale: 0 where the row has its own. The scale of a row that is not finite is NaN.
  void (*quantize)(const float* x, const float* smooth, int n, float static_scale, int8_t* q, int8_t* residual,
                   RowQuant* row) = nullptr;
  // sums[g] = 8 sum of 256 q + residual over each group; without a residual (null) 8 sum of q
  void (*sum_groups)(const int8_t* q, const int8_t* residual, int n, int group, int32_t* sums) = nullptr;
  void (*gelu)(float* x, int n) = nullptr;
  // y[o] = (sums[o] + residual_sums[o] / 256) (scale weight_scale[o]) + bias[o] for 64 outputs; residual_sums and
  // bias may be null.
  void (*dequantize8)(const int32_t* sums, const int32_t* residual_sums, float scale, const float* weight_scale,
                      const float* bias, float* y) = nullptr;
  // y[o] = sums[o] (scale / 256) + bias[o]
  void (*dequantize4)(const float* sums, float scale, const float* bias, float* y) = nullptr;
  void (*add)(const float* x, int n, float* y) = nullptr;  // y += x

  // ---- attention; kv is one of JAXGPT_KV_*, D the head size

  // Puts one position's key and value (D) into the cache.
  void (*store_kv)(const HeadCache* cache, int kv, int D, int position, const float* key,
                   const float* value) = nullptr;
  // Attention of `rows` queries, row r at position first + r, over positions 0 to its own.
  //   query [r][Dp] scaled already, zeros beyond D; scores: scratch for kMaxQueries x padded(first + rows) doubles
  void (*attend)(const HeadCache* cache, int kv, int D, int first, int rows, const double* query, double* scores,
                 float* mixed, ptrdiff_t mixed_stride) = nullptr;
  // Prefetches one of `parts` shares of the keys and values of the first `positions` positions.
  void (*prefetch_cache)(const HeadCache* cache, int kv, int D, int positions, int part, int parts) = nullptr;

  // ---- the head

  // lanes[16]: the maximum of 64 in each lane; what is not finite makes its lane NaN.
  void (*fold_max)(const float* y, float* lanes) = nullptr;
  // Index of the maximum of n, the first of equals; -1 where one is not finite.
  int (*argmax)(const float* x, int n) = nullptr;
  // Upper bounds of 64 logits: upper[o] = scale[o] (coarse[o] rate + middle) + error[o] length
  void (*screen_bounds)(const float* coarse, float rate, float middle, float length, const float* scale,
                        const float* error, float* upper) = nullptr;
  float (*max)(const float* x, int n) = nullptr;  // of n, a multiple of 16
  // Of n: scaled = (x - top) / temperature, top the largest of them, and exp of it: the same bits everywhere.
  void (*exponentials)(const float* x, int n, double top, double temperature, double* scaled, double* weights) = nullptr;
  // The sum of exp((x - top) / temperature) over n, top the largest of them: the same bits whatever the instruction set.
  double (*sum_exponentials)(const float* x, int n, double top, double temperature) = nullptr;

  // ---- for benchmarks

  // Something that depends on every byte of n (a multiple of 256), read as a step reads weights.
  uint64_t (*read)(const uint8_t* bytes, size_t n) = nullptr;
};

const Kernels* portable_kernels();
#if defined(__x86_64__)
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();  // AVX512-VNNI, and the matrix unit where the system lends it
#endif
#if defined(__aarch64__)
const Kernels* neon_kernels();  // null without the dot product instruction
#endif

// select.cpp: the kernels that this machine can run, the best first, ended by a null.
const Kernels* const* kernels_here();
// By name; null for one that is not there. Null names the best.
const Kernels* find_kernels(const char* name);
// The same; throws JAXGPT_BAD_ARGUMENT where it is not there.
const Kernels* require_kernels(const char* name);
// Their names, separated by spaces.
const char* kernel_names();
