#include "model.h"

#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "runtime/errors.h"

namespace {
#include "kernels/plain.inl"
}

size_t Matrix::bytes_read() const {
  const size_t O = size_t(outputs), of_groups = group ? O * size_t(inputs / group) * (factors ? 1 : 2) : 0;
  const size_t scales = is_float() ? 0 : of_groups + (bits == 8 || factors ? O * 4 : 0);
  return size_t(outputs) * size_t(inputs) * size_t(bits) / 8 + scales;
}

jaxgpt_model::jaxgpt_model(const jaxgpt_shape& given, const Kernels* chosen, int count)
    : shape(given),
      kernels(chosen),
      threads(shared_pool(count)),
      pool(threads->pool),
      step_mutex(threads->turn),
      layers(size_t(given.n_layer)) {
  const int C = shape.n_embd;
  // Of matrix `at`, with scales for groups of 8, as small as they come, and biases.
  const auto room = [&](int at, int outputs, int inputs) {
    const size_t bits = size_t(given.bits ? given.bits[at] : given.max_bits);
    return size_t(padded(outputs)) * (size_t(padded(inputs)) * (bits + 2) / 8 + 2 * sizeof(float));
  };
  size_t bytes = room(4 * shape.n_layer, shape.vocab_size, C);
  for (int at = 0; at < 4 * shape.n_layer; at += 4)
    bytes += room(at, 3 * C, C) + room(at + 1, C, C) + room(at + 2, 4 * C, C) + room(at + 3, C, 4 * C);
  shape.bits = nullptr;  // read during the call only
  pages = Pages(bytes, true);
  for (Layer& one : layers) one.matrices[JAXGPT_C_ATTN].qkv_tile_group = heads_per_group() * head_size() / kTile;
}

// The threads may serve other models for long: they no longer prefetch what is gone.
jaxgpt_model::~jaxgpt_model() { pool.prefetch_later(nullptr, 0, 0); }

int jaxgpt_model::heads_per_group() const {
  const int D = head_size(), heads = D % kTile == 0 ? 1 : kTile % D == 0 ? kTile / D : 0;
  return heads && shape.n_head % heads == 0 ? heads : 0;
}

uint8_t* jaxgpt_model::allocate(size_t bytes) {
  if (bytes > pages.bytes() - pages_used)
    throw_error(JAXGPT_BAD_STATE, "the matrices take more room than the model's shape gives");
  uint8_t* taken = pages.as<uint8_t>() + pages_used;
  pages_used += bytes;
  return taken;
}

void jaxgpt_model::check_complete() {
  const auto whole = [&](const Norm& norm) { return int(norm.gain.size()) == shape.n_embd; };
  bytes_read = 0;
  for (const Layer& layer : layers) {
    if (!whole(layer.norms[0]) || !whole(layer.norms[1])) throw_error(JAXGPT_BAD_STATE, "a layer has no norms");
    for (const Matrix& matrix : layer.matrices) {
      if (!matrix.outputs) throw_error(JAXGPT_BAD_STATE, "a layer lacks a matrix");
      bytes_read += int64_t(matrix.bytes_read());
    }
  }
  if (!whole(last_norm) || !head.outputs) throw_error(JAXGPT_BAD_STATE, "the head or its norm is missing");
  bytes_read += int64_t(head.bytes_read());
  if (!tokens_set) throw_error(JAXGPT_BAD_STATE, "the token embedding is missing");
  if (shape.rotary ? rope_table.empty() : position_rows.empty())
    throw_error(JAXGPT_BAD_STATE, "the positions are missing");
  ready = true;
}

void jaxgpt_model::prefetch_qkv(int layer) {
  const Matrix& matrix = layers[size_t(layer)].matrices[JAXGPT_C_ATTN];
  const int tiles = std::max(1, 3 * matrix.qkv_tile_group);  // of a piece
  pool.prefetch_later(matrix.tile(0), size_t(tiles) * matrix.tile_bytes(), matrix.tiles() / tiles);
}

void jaxgpt_model::apply_rope(int position, const float* from, float* to) const {
  const int D = head_size(), half = D / 2;
  const float* cosine = &rope_table[size_t(position) * size_t(D)];
  const float* sine = cosine + size_t(shape.block_size) * size_t(D);
  for (int i = 0; i < half; i++) {
    to[i] = from[i] * cosine[i] - from[half + i] * sine[i];
    to[half + i] = from[half + i] * cosine[half + i] + from[i] * sine[half + i];
  }
}

EmbeddingRows::EmbeddingRows(const void* rows, const float* scales, size_t count, size_t width) {
  if (scales) {
    integers.assign(static_cast<const int8_t*>(rows), static_cast<const int8_t*>(rows) + count * width);
    scale.assign(scales, scales + count);
  } else {
    floats.assign(static_cast<const float*>(rows), static_cast<const float*>(rows) + count * width);
  }
}

// A row of the head, of floats or nibbles in its tiles.
void jaxgpt_model::embed_from_head(int token, float* x) const {
  const int tile = token / kTile, output = token % kTile;
  if (head.is_float()) {
    for (int i = 0; i < shape.n_embd; i++) {
      const size_t at = size_t(i) * kTile + size_t(output);
      x[i] = head.bits == 32 ? reinterpret_cast<const float*>(head.weights(tile))[at]
                             : half_to_f32(reinterpret_cast<const uint16_t*>(head.weights(tile))[at]);
    }
    return;
  }
  const uint8_t* row = head.weights(tile) + output * 4;
  const uint8_t* lo = head.nibble_planes ? head.lo_plane(tile) + output * 4 : nullptr;
  for (int i = 0; i < shape.n_embd; i++) {
    const int at = i / 8 * kSliceBytes + i % 4, shift = i % 8 / 4 * 4;
    const int hi = (row[at] >> shift & 15) - 8;
    if (lo)
      x[i] = float(16 * hi + (lo[at] >> shift & 15)) * head.row_scales(tile)[output];
    else if (head.factors)
      x[i] = float(hi * head.group_factors(tile)[i / head.group * kTile + output]) * head.row_scales(tile)[output];
    else
      x[i] = float(hi) * bf16_to_f32(head.scales4(tile)[i / head.group * kTile + output]);
  }
}

void jaxgpt_model::embed(int token, int position, float* x) const {
  const int C = shape.n_embd;
  if (shape.tied) {
    embed_from_head(token, x);
  } else {
    for (int i = 0; i < C; i++) x[i] = token_rows.of(token, i, C);
  }
  if (!token_smooth.empty())
    for (int i = 0; i < C; i++) x[i] /= token_smooth[size_t(i)];
  if (shape.rotary) return;
  for (int i = 0; i < C; i++) x[i] += position_rows.of(position, i, C);
}
