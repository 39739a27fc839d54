// What each instruction set brings: the loops that a step spends its time in, behind one table of functions.
#pragma once

#include "layout.h"

// Before a loop of at most 8 rounds, a constant number, whose array is to lie in registers: without it GCC 12 writes
// every element back to memory in each round of the loop around it.
#define UNROLLED _Pragma("GCC unroll 8")

// Inlined at once: GCC takes a function that only prefetches for one that does nothing, and drops calls of it.
#define INLINED inline __attribute__((always_inline))

// Asks for weights ahead, far into the second cache, near into the first; see docs/engine.md for what was tried. Streams
// that are read side by side share the distance.
constexpr int kFar = 8192, kNear = 2048;
template <int Bytes, int Streams = 1>
INLINED void ask_ahead(const uint8_t* p) {
  for (int line = 0; line < Bytes; line += 64) {
    __builtin_prefetch(p + kFar / Streams + line, 0, 2);
    __builtin_prefetch(p + kNear / Streams + line, 0, 3);
  }
}

// A layer's keys and values of one slot and head, in blocks of 64 positions. Dp is the head size padded to 16.
//   keys     [4][Dp][16]   16 positions side by side, so that scores are computed without sums across lanes
//   values   [64][Dp]
// The same head's next block is `stride` bytes further on: between them lie the other heads and layers, so that a
// text touches no more memory than it has positions, and few large pages.
// Elements are float, half or int8; int8 ones have a step for each position (64 of a block).
constexpr int kBlock = 64;

struct HeadCache {
  uint8_t* keys;
  uint8_t* values;
  uint8_t* key_scale;
  uint8_t* value_scale;
  size_t stride;
  ptrdiff_t ahead = 0;  // from here to what is attended to next, which is asked for meanwhile; 0: nothing
};

struct Kernels {
  const char* name;
  // Tokens from which on `many` is taken instead of `dot8`; 0 where there is none.
  int many_from;

  // sums[r][64] = start[r] + sum_k tile[o][k] x[r][k]; exact.
  void (*dot8)(const uint8_t* tile, int inputs, const int8_t* x, ptrdiff_t stride, int rows, const int32_t* start,
               int32_t* sums);
  void (*many)(const uint8_t* tile, int inputs, const int8_t* x, ptrdiff_t stride, int rows, const int32_t* start,
               int32_t* sums);
  // dot8 of a tile of halves; null where it is as quick to join them before.
  void (*dot_halves)(const uint8_t* upper, const uint8_t* lower, int inputs, const int8_t* x, ptrdiff_t stride,
                     int rows, const int32_t* start, int32_t* sums);
  // Makes a tile of 8 bits of halves: the bytes of `outputs` outputs from `first` on, the others stay as they are.
  void (*join)(const uint8_t* upper, const uint8_t* lower, int inputs, int first, int outputs, uint8_t* tile);
  // dot8 of 16 outputs; `column` is the tile's start + 64 times which 16 they are; sums lie as dot8's.
  void (*column8)(const uint8_t* column, int inputs, const int8_t* x, ptrdiff_t stride, int rows, const int32_t* start,
                  int32_t* sums);
  // Rows come in pairs (a rounding and what it left): sums[m][64] = sum over groups of scale[g][o] times
  // sum_k q[o][k] (256 x[2 m][k] + x[2 m + 1][k]). group_sums[m][g] = 8 sum_k (256 x[2 m][k] + x[2 m + 1][k]).
  void (*dot4)(const uint8_t* tile, const uint16_t* scale, int inputs, int group, const int8_t* x, ptrdiff_t stride,
               int tokens, const int32_t* group_sums, float* sums);

  void (*layer_norm)(const float* x, const float* gain, const float* bias, int n, float* y);
  // Rounds a row (see export/arithmetic.py); q, and fine where it is not null, are filled with zeros up to
  // padded(n).
  void (*quantize)(const float* x, const float* smooth, int n, float static_scale, int8_t* q, int8_t* fine,
                   RowStep* step);
  // sums[g] = 8 sum of 256 q + fine over each group
  void (*sum_groups)(const int8_t* q, const int8_t* fine, int n, int group, int32_t* sums);
  void (*gelu)(float* x, int n);
  // y[o] = (sums[o] + fine_sums[o] / 256) (scale weight_scale[o]) + bias[o] for 64 outputs; fine_sums
  // and bias may be null.
  void (*finish8)(const int32_t* sums, const int32_t* fine_sums, float scale, const float* weight_scale,
                  const float* bias, float* y);
  // y[o] = sums[o] (scale / 256) + bias[o]
  void (*finish4)(const float* sums, float scale, const float* bias, float* y);
  void (*add)(const float* x, int n, float* y);  // y += x

  // Puts one position's key and value (D) into the cache.
  void (*remember)(const HeadCache* cache, int kv, int D, int position, const float* key, const float* value);
  // Attention of `rows` queries, row r at position first + r, over positions 0 to its own.
  //   query [r][Dp] scaled already, zeros beyond D; scores: scratch for 4 x padded(first + rows) doubles
  void (*attend)(const HeadCache* cache, int kv, int D, int first, int rows, const double* query, double* scores,
                 float* mixed, ptrdiff_t mixed_stride);

  // Asks for one of `parts` shares of the keys and values of the first `positions` positions.
  void (*ask_for)(const HeadCache* cache, int kv, int D, int positions, int part, int parts);

  // lanes[16]: the largest of 64 in each lane; what is not finite makes its lane NaN.
  void (*fold)(const float* y, float* lanes);
  // Largest of n and its index, the first of equals; returns -1 where one is not finite.
  int (*largest)(const float* x, int n);
  // upper[o] = step[o] (coarse[o] rate + middle) + error[o] length for 64 outputs
  void (*bounds)(const float* coarse, float rate, float middle, float length, const float* step, const float* error,
                 float* upper);
  float (*most)(const float* x, int n);  // the largest of n, a multiple of 16

  // Something that depends on every byte of n (a multiple of 256), read as a step reads weights.
  uint64_t (*read)(const uint8_t* bytes, size_t n);
};

const Kernels* portable_kernels();
#if defined(__x86_64__)
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();  // AVX512-VNNI, and the matrix unit where the system lends it
#endif
#if defined(__aarch64__)
const Kernels* neon_kernels();
#endif

// The kernels that this machine can run, the best first, ended by a null.
const Kernels* const* kernels_here();
// By name; null for one that is not there. Null names the best.
const Kernels* find_kernels(const char* name);
