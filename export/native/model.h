// A model: its weights, packed once into the layout of layout.h, and the threads that multiply with them.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "engine.h"
#include "kernels/kernels.h"
#include "runtime/pages.h"
#include "runtime/pool.h"

constexpr int kMaxHeadSize = 512;  // channels; larger ones are refused

struct Matrix {
  int outputs = 0, inputs = 0, bits = 8, group = 0;
  bool factors = false;        // 4 bits: groups have whole factors, rows a scale
  bool two_level = false;      // the input's residual is quantized too
  bool nibble_planes = false;  // of 8 bits: tiles have the hi plane, the lo plane lies behind the last tile
  float input_scale = 0;       // static; 0: each row has its own
  bool has_bias = false;
  // Of c_attn: so many tiles of keys, then of values, then of queries, then the next group; 0: outputs in order.
  int qkv_tile_group = 0;
  uint8_t* tiles_start = nullptr;  // in the model's pages
  std::vector<float> smooth;       // divides the input; empty without one

  int tiles() const { return padded(outputs) / kTile; }
  // Of the outputs in a tile.
  int first_output(int tile) const {
    if (!qkv_tile_group) return tile * kTile;
    const int group_index = tile / (3 * qkv_tile_group), rest = tile % (3 * qkv_tile_group);
    const int part = (rest / qkv_tile_group + 1) % 3;  // queries, keys, values
    return (part * (tiles() / 3) + group_index * qkv_tile_group + rest % qkv_tile_group) * kTile;
  }
  int groups() const { return (padded(inputs) + group - 1) / group; }
  // Whether weights are floats, 16 or 32 bits; then inputs stay floats too.
  bool is_float() const { return bits >= 16; }
  // The rows of integers that a row of input becomes.
  int parts() const { return two_level ? 2 : 1; }
  // A tile and what lies in it; see layout.h.
  size_t weight_bytes() const { return size_t(kTile) * size_t(padded(inputs)) * size_t(nibble_planes ? 4 : bits) / 8; }
  size_t scale_bytes() const {
    if (is_float()) return 0;
    if (bits == 8) return kTile * sizeof(float);
    return factors ? size_t(groups()) * kTile + kTile * sizeof(float) : size_t(groups()) * kTile * sizeof(uint16_t);
  }
  size_t tile_bytes() const { return weight_bytes() + scale_bytes() + (has_bias ? kTile * sizeof(float) : 0); }
  uint8_t* tile(int t) const { return tiles_start + size_t(t) * tile_bytes(); }
  uint8_t* weights(int t) const { return bits == 4 ? tile(t) + scale_bytes() : tile(t); }  // or their hi plane
  uint8_t* lo_plane(int t) const { return tile(tiles()) + size_t(t) * weight_bytes(); }
  // Scales of rows: behind the weights, or, with factors, before them.
  float* row_scales(int t) const { return reinterpret_cast<float*>(bits == 8 ? tile(t) + weight_bytes() : tile(t)); }
  // Factors or scales of the groups.
  uint8_t* groups_start(int t) const { return tile(t) + (factors ? kTile * sizeof(float) : 0); }
  int8_t* group_factors(int t) const { return reinterpret_cast<int8_t*>(groups_start(t)); }
  uint16_t* scales4(int t) const { return reinterpret_cast<uint16_t*>(tile(t)); }
  float* bias(int t) const {
    return has_bias ? reinterpret_cast<float*>(tile(t) + weight_bytes() + scale_bytes()) : nullptr;
  }
  size_t bytes_read() const;
};

struct Norm {
  std::vector<float> gain, bias;
};

struct Layer {
  Norm norms[2];
  Matrix matrices[4];
};

// Rows of an embedding: integers with scales, or floats.
struct EmbeddingRows {
  std::vector<int8_t> integers;
  std::vector<float> scale, floats;

  EmbeddingRows() = default;
  EmbeddingRows(const void* rows, const float* scale, size_t count, size_t width);
  bool empty() const { return integers.empty() && floats.empty(); }
  float of(int row, int i, int width) const {
    const size_t at = size_t(row) * size_t(width) + size_t(i);
    return scale.empty() ? floats[at] : float(integers[at]) * scale[size_t(row)];
  }
};

struct jaxgpt_model {
  jaxgpt_model(const jaxgpt_shape& shape, const Kernels* kernels, int threads);
  ~jaxgpt_model();

  jaxgpt_shape shape;
  const Kernels* kernels;
  Pages pages;  // of all matrices
  size_t pages_used = 0;
  std::shared_ptr<SharedPool> threads;
  Pool& pool;
  std::mutex& step_mutex;  // held by the session that runs
  std::vector<Layer> layers;
  Norm last_norm;
  Matrix head;
  EmbeddingRows token_rows, position_rows;
  std::vector<float> token_smooth;
  std::vector<float> rope_table;    // cosines, then sines
  std::vector<float> screen_error;  // of each of the head's outputs; filled by the first screened step (logits/head.cpp)
  bool tokens_set = false, ready = false;
  int64_t bytes_read = 0;

  int head_size() const { return shape.n_embd / shape.n_head; }
  // How many heads fill whole tiles of queries, of keys and of values; 0 where heads and tiles do not go together.
  int heads_per_group() const;
  // Packs a matrix (pack.cpp); one of 8 bits into nibble planes where told so.
  void set_matrix(Matrix& matrix, const jaxgpt_linear& linear, int outputs, int inputs, const char* name,
                  bool nibble_planes = false);
  void check_complete();
  // Rotates the query or key of a head by the angles of a position.
  void apply_rope(int position, const float* from, float* to) const;
  // Tells the pool what the loop after the next reads (see Pool::prefetch_later): tiles, or heads of c_attn.
  void prefetch_tiles(const Matrix& matrix) {
    pool.prefetch_later(matrix.tile(0), matrix.tile_bytes(), matrix.tiles());
  }
  void prefetch_qkv(int layer);
  // Embedding of a token at a position, (C).
  void embed(int token, int position, float* x) const;

 private:
  uint8_t* allocate(size_t bytes);
  void embed_from_head(int token, float* x) const;
};
