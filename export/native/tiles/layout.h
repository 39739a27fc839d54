// How matrices lie in memory, and what quantizing a row of input gives.
//
// A matrix (O, I) is cut into tiles of 64 outputs, each read from front to back, and the tiles lie one after the
// other: a decode step reads every byte once, in order. O is padded to 64 and I to 64, with zeros.
//
//   tile, 8 bits     64 I bytes of weights | 64 scales, float | 64 biases, float (not in the head)
//   tile, 4 bits     I / group x 64 scales, bfloat16 | 32 I bytes of weights | 64 biases, float
//   tile, floats     64 I weights of 16 or 32 bits, the 64 outputs of an input side by side | 64 biases, float
//   tile, planes     32 I bytes, the hi nibbles of weights of 8 bits | 64 scales, float; behind the last tile the lo
//                    nibbles of all of them. Only the head: logits/head.cpp's screen reads the hi plane alone
//
//   8 bits, weights of a tile:                                 one slice of 4 inputs (256 bytes):
//
//     inputs 0-3 | inputs 4-7 | ... | inputs I-4..I-1     output 0: k k k k | output 1: k k k k | ... | output 63
//
//     A byte is the integer + 128, unsigned: the instruction that multiplies bytes wants one side unsigned. So
//     sum(w x) = sum((w + 128) x) - 128 sum(x), and sums start at -128 sum(x).
//     16 outputs of a slice are a 64-byte vector, and 16 slices of one such column a tile of the matrix unit (AMX).
//
//   4 bits, weights of a tile:                       one slice of 8 inputs (256 bytes):
//
//     inputs 0-7 | inputs 8-15 | ...                      output 0: 4 bytes | output 1: 4 bytes | ... | output 63
//                                                         byte j: input j in the low nibble, 4 + j in the high
//     A nibble is the integer + 8. The nibble planes of 8 bits lie as these do; a byte is 16 hi + lo.
//
//   input rows: of matrices of floats as they are; else int8, padded to I; with a two-level input row 2 m has the integers of row m and row 2 m + 1 those of
//     its residual, what the first rounding left.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

constexpr int kTile = 64;         // outputs of a tile, and what widths are padded to
constexpr int kSliceBytes = 256;  // a slice of a tile: 64 outputs x 4 inputs, or x 8 inputs of 4 bits
constexpr int kColumn = 16;       // outputs of a column: a slice has a cache line of each
constexpr int kColumns = kTile / kColumn;

constexpr int padded(int n) { return (n + kTile - 1) / kTile * kTile; }

inline float bf16_to_f32(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  memcpy(&x, &wide, 4);
  return x;
}

// What quantizing a row of input gives beside the integers.
struct RowQuant {
  float scale;
  int32_t start;           // -128 x sum of the integers
  int32_t residual_start;  // the same of the residual's
};
