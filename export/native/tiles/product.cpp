#include "tiles/product.h"

void InputRows::reserve(int rows, int width, int normalized_width) {
  normalized = Pages(size_t(rows) * size_t(padded(normalized_width)) * sizeof(float), false);
  integers = Pages(2 * size_t(rows) * size_t(padded(width)), false);
  quants.resize(size_t(rows));
  starts.resize(2 * size_t(rows));
}

void InputRows::take(jaxgpt_model& model, const Matrix& matrix, const float* x, int x_width, int rows,
                     const Norm* norm) {
  const Kernels& k = *model.kernels;
  const int n = matrix.inputs, width = padded(n), parts = matrix.parts();
  const int groups = matrix.bits == 4 ? matrix.groups() : 0;
  const int sums_per_row = matrix.factors ? parts * groups : groups;
  group_sums.resize(size_t(rows) * size_t(sums_per_row));
  floats = norm ? normalized.as<float>() : x;
  float_width = norm ? padded(model.shape.n_embd) : x_width;
  const auto take_row = [&](int m) {
    const float* row = x + size_t(m) * size_t(x_width);
    if (norm) {
      float* place = normalized.as<float>() + size_t(m) * size_t(float_width);
      k.layer_norm(row, norm->gain.data(), norm->bias.data(), n, place);
      row = place;
    }
    if (matrix.is_float()) return;
    int8_t* q = integers.as<int8_t>() + size_t(m) * size_t(parts) * size_t(width);
    int8_t* residual = matrix.two_level ? q + width : nullptr;
    const float* smooth = matrix.smooth.empty() ? nullptr : matrix.smooth.data();
    RowQuant& quant = quants[size_t(m)];
    k.quantize(row, smooth, n, matrix.input_scale, q, residual, &quant);
    starts[size_t(m) * size_t(parts)] = quant.start;
    if (residual) starts[size_t(m) * 2 + 1] = quant.residual_start;
    int32_t* own_sums = group_sums.data() + size_t(m) * size_t(sums_per_row);
    if (matrix.factors) {
      k.sum_groups(q, nullptr, width, matrix.group, own_sums);
      if (residual) k.sum_groups(residual, nullptr, width, matrix.group, own_sums + groups);
    } else if (groups) {
      k.sum_groups(q, residual, width, matrix.group, own_sums);
    }
  };
  if (matrix.is_float() && !norm) return;
  if (rows < 4)
    for (int m = 0; m < rows; m++) take_row(m);
  else
    model.pool.run(rows, take_row);
}

const uint8_t* merged_planes(const Kernels& kernels, const Matrix& matrix, int tile, int first, int outputs) {
  static thread_local std::vector<uint8_t> whole;
  whole.resize(size_t(kTile) * size_t(padded(matrix.inputs)));
  kernels.merge_planes(matrix.weights(tile), matrix.lo_plane(tile), padded(matrix.inputs), first, outputs,
                       whole.data());
  return whole.data();
}

namespace {

// The kernels prefetch what lies ahead of the weights they read; this does it for what else lies between the weights of
// two tiles.
void prefetch_ahead_of_gaps(const Kernels& k, const Matrix& matrix, int tile) {
  const Prefetch ahead = matrix.is_float() ? kUsualPrefetch : k.prefetch;
  if (!ahead.far) return;
  const int streams = matrix.nibble_planes ? 2 : 1;
  const auto prefetch = [&](const uint8_t* gap, const uint8_t* end) {
    for (; gap < end; gap += 64) {
      __builtin_prefetch(gap + ahead.far / streams, 0, 2);
      __builtin_prefetch(gap + ahead.near / streams, 0, 3);
    }
  };
  const uint8_t* weights = matrix.weights(tile);
  const uint8_t* groups = matrix.bits == 4 && k.prefetches_groups ? matrix.groups_start(tile) : weights;
  prefetch(matrix.tile(tile), groups);
  prefetch(weights + matrix.weight_bytes(), matrix.tile(tile) + matrix.tile_bytes());
}

}  // namespace

float* multiply_tile(const Kernels& k, const Matrix& matrix, int tile, const InputRows& rows_of_x, int rows) {
  alignas(64) static thread_local int32_t sums[2 * kChunk * kTile];
  alignas(64) static thread_local float y[kChunk * kTile];
  const int width = padded(matrix.inputs), parts = matrix.parts();
  const int8_t* x = rows_of_x.integers.as<int8_t>();
  const RowQuant* quants = rows_of_x.quants.data();
  const int32_t* starts = rows_of_x.starts.data();
  prefetch_ahead_of_gaps(k, matrix, tile);
  if (matrix.is_float()) {
    const float* in = rows_of_x.floats;
    if (matrix.bits == 32)
      k.dot_float32(reinterpret_cast<const float*>(matrix.weights(tile)), matrix.inputs, in, rows_of_x.float_width, rows,
                    matrix.bias(tile), y);
    else
      k.dot_float16(reinterpret_cast<const uint16_t*>(matrix.weights(tile)), matrix.inputs, in, rows_of_x.float_width,
                    rows, matrix.bias(tile), y);
    return y;
  }
  if (matrix.bits == 4 && !matrix.factors) {
    auto* floats = reinterpret_cast<float*>(sums);
    k.dot4(matrix.weights(tile), matrix.scales4(tile), false, width, matrix.group, x, width, rows,
           rows_of_x.group_sums.data(), floats);
    for (int m = 0; m < rows; m++) k.dequantize4(floats + m * kTile, quants[m].scale, matrix.bias(tile), y + m * kTile);
    return y;
  }
  const int all = rows * parts;
  if (matrix.factors) {
    k.dot4_factors(matrix.weights(tile), matrix.group_factors(tile), width, matrix.group, x, width, all,
                   rows_of_x.group_sums.data(), sums);
  } else if (matrix.nibble_planes && all <= k.planes_max_rows) {
    k.dot8_planes(matrix.weights(tile), matrix.lo_plane(tile), width, x, width, all, starts, sums);
  } else {
    const uint8_t* weights =
        matrix.nibble_planes ? merged_planes(k, matrix, tile, 0, kTile) : matrix.weights(tile);
    k.dot8(weights, width, x, width, all, starts, sums);
  }
  for (int m = 0; m < rows; m++) {
    const int32_t* own = sums + m * parts * kTile;
    k.dequantize8(own, matrix.two_level ? own + kTile : nullptr, quants[m].scale, matrix.row_scales(tile),
                  matrix.bias(tile), y + m * kTile);
  }
  return y;
}
