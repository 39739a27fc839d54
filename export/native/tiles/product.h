// Products of rows and a matrix, tile by tile: what every layer and the head do.
#pragma once

#include <vector>

#include "model.h"

constexpr int kChunk = 256;  // rows that a prompt takes at once: scratch stays small, and weights are read rarely

// Rows of input as a matrix takes them: floats, or integers, one row or two (with the residual) each, and what belongs
// to them.
struct InputRows {
  // Makes room for `rows` rows of up to `width` inputs, or `normalized_width` where they are normalized.
  void reserve(int rows, int width, int normalized_width);
  // Takes `rows` rows of x, normalized where there is a norm, and quantizes them unless the matrix has floats; then
  // x itself must stay until the product is done.
  void take(jaxgpt_model& model, const Matrix& matrix, const float* x, int x_width, int rows, const Norm* norm);

  const float* floats = nullptr;  // of a matrix of floats, float_width apart
  int float_width = 0;
  Pages normalized;
  Pages integers;
  std::vector<RowQuant> quants;
  std::vector<int32_t> starts;      // of each row of integers
  std::vector<int32_t> group_sums;  // for matrices of 4 bits
};

// y (rows, 64) of one tile; it stays until this thread's next tile.
float* multiply_tile(const Kernels& kernels, const Matrix& matrix, int tile, const InputRows& x, int rows);

// The bytes of `outputs` outputs of a tile in nibble planes, from `first` on; they stay until this thread merges others.
const uint8_t* merged_planes(const Kernels& kernels, const Matrix& matrix, int tile, int first, int outputs);

// Prefetches the 64 floats that a tile's first row is written to or added to: another thread may have had them last.
inline void prefetch_target(const float* target) {
  for (int o = 0; o < kTile; o += 64 / int(sizeof(float))) __builtin_prefetch(target + o, 1, 3);
}

// Calls finish(tile, y) with y (rows, 64) for every tile, on all threads; target(tile) is where it puts the first row.
template <typename Target, typename Finish>
void multiply(jaxgpt_model& model, const Matrix& matrix, const InputRows& x, int rows, const Target& target,
              const Finish& finish) {
  model.pool.run(matrix.tiles(), [&](int tile) {
    prefetch_target(target(tile));
    finish(tile, multiply_tile(*model.kernels, matrix, tile, x, rows));
  });
}
