// How matrices lie in memory, and what rounds a row of input.
//
// A matrix (O, I) is cut into tiles of 64 outputs, each read from front to back, and the tiles lie one after the
// other: a decode step reads every byte once, in order. O is padded to 64 and I to 64, with zeros.
//
//   tile, 8 bits     64 I bytes of weights | 64 steps, float | 64 biases, float (not in the head)
//   tile, 4 bits     I / group x 64 steps, bfloat16 | 32 I bytes of weights | 64 biases, float
//   tile, halves     32 I bytes, the upper halves of weights of 8 bits | 64 steps, float; behind the last tile the
//                    lower halves of all of them. Only the head: see head.cpp for what its upper halves are read for
//
//   8 bits, weights of a tile:                                 one step of 4 inputs (256 bytes):
//
//     inputs 0-3 | inputs 4-7 | ... | inputs I-4..I-1     output 0: k k k k | output 1: k k k k | ... | output 63
//
//     A byte is the integer + 128, unsigned: the instruction that multiplies bytes wants one side unsigned. So
//     sum(w x) = sum((w + 128) x) - 128 sum(x), and sums start at -128 sum(x).
//     16 outputs of a step are a 64-byte vector, and 16 steps of one such column a tile of the matrix unit (AMX).
//
//   4 bits, weights of a tile:                       one step of 8 inputs (256 bytes):
//
//     inputs 0-7 | inputs 8-15 | ...                      output 0: 4 bytes | output 1: 4 bytes | ... | output 63
//                                                         byte j: input j in the low half, 4 + j in the high
//     A half byte is the integer + 8. Halves of 8 bits lie as these do; a byte is 16 upper + lower.
//
//   input rows: int8, padded to I; with a fine input row 2 m has the integers of row m and row 2 m + 1 those of
//     what the first rounding left.
#pragma once

#include <stddef.h>
#include <stdint.h>

constexpr int kTile = 64;        // outputs of a tile, and what widths are padded to
constexpr int kStepBytes = 256;  // a step of a tile: 64 outputs x 4 inputs, or x 8 inputs of 4 bits

constexpr int padded(int n) { return (n + kTile - 1) / kTile * kTile; }

// What rounding a row of input gives beside the integers.
struct RowStep {
  float scale;
  int32_t start;       // -128 x sum of the integers
  int32_t fine_start;  // the same of the second ones
};
