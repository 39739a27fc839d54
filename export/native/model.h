// A model's weights, packed once into the layout of layout.h, on huge pages.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine.h"
#include "kernels.h"
#include "pool.h"

// Memory that is zero at first, in pages of 2 MB where the system has them.
class Pages {
 public:
  Pages() = default;
  Pages(size_t bytes, bool huge);
  ~Pages();
  Pages(Pages&& other) noexcept { swap(other); }
  Pages& operator=(Pages&& other) noexcept {
    swap(other);
    return *this;
  }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(start_);
  }
  size_t bytes() const { return bytes_; }
  void swap(Pages& other) {
    std::swap(start_, other.start_);
    std::swap(bytes_, other.bytes_);
    std::swap(mapped_, other.mapped_);
  }

 private:
  uint8_t* start_ = nullptr;
  size_t bytes_ = 0, mapped_ = 0;
};

struct Matrix {
  int outputs = 0, inputs = 0, bits = 8, group = 0;
  bool fine = false;
  bool halves = false;  // of 8 bits: tiles have the upper halves, the lower ones lie behind the last tile
  float input_scale = 0;
  bool has_bias = false;
  int thirds = 0;  // of c_attn: so many tiles of keys, then of values, of queries, then the next; 0: as they come
  uint8_t* tiles_start = nullptr;  // in the model's pages
  std::vector<float> smooth;       // empty without one

  int tiles() const { return padded(outputs) / kTile; }
  // Of the outputs in a tile.
  int first_output(int tile) const {
    if (!thirds) return tile * kTile;
    const int together = tile / (3 * thirds), rest = tile % (3 * thirds);
    return ((rest / thirds + 1) % 3 * (tiles() / 3) + together * thirds + rest % thirds) * kTile;
  }
  int groups() const { return (padded(inputs) + group - 1) / group; }
  // The rows of integers that a row of input becomes.
  int parts() const { return fine ? 2 : 1; }
  // A tile and what lies in it; see layout.h.
  size_t weight_bytes() const { return size_t(kTile) * size_t(padded(inputs)) * size_t(halves ? 4 : bits) / 8; }
  size_t step_bytes() const { return bits == 8 ? kTile * sizeof(float) : size_t(groups()) * kTile * sizeof(uint16_t); }
  size_t tile_bytes() const { return weight_bytes() + step_bytes() + (has_bias ? kTile * sizeof(float) : 0); }
  uint8_t* tile(int t) const { return tiles_start + size_t(t) * tile_bytes(); }
  uint8_t* weights(int t) const { return bits == 8 ? tile(t) : tile(t) + step_bytes(); }
  uint8_t* lower(int t) const { return tile(tiles()) + size_t(t) * weight_bytes(); }
  float* steps8(int t) const { return reinterpret_cast<float*>(tile(t) + weight_bytes()); }
  uint16_t* steps4(int t) const { return reinterpret_cast<uint16_t*>(tile(t)); }
  float* bias(int t) const {
    return has_bias ? reinterpret_cast<float*>(tile(t) + weight_bytes() + step_bytes()) : nullptr;
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

struct jaxgpt_model {
  jaxgpt_model(const jaxgpt_shape& shape, const Kernels* kernels, int threads);

  jaxgpt_shape shape;
  const Kernels* kernels;
  Pages pages;  // of all matrices, room for 8 bits each; what is not written takes no memory
  size_t pages_used = 0;
  Pool pool;
  std::mutex turn;  // held by the session that runs
  std::vector<Layer> layers;
  Norm last_norm;
  Matrix head;
  std::vector<int8_t> token_rows, position_rows;
  std::vector<float> token_scale, position_scale, token_smooth;
  std::vector<float> turns;
  std::vector<float> screen_error;  // of each of the head's outputs, once it was screened; see head.cpp
  bool use_screen = true;
  bool tokens_set = false, ready = false;
  int64_t bytes_read = 0;

  int head_size() const { return shape.n_embd / shape.n_head; }
  // How many heads fill whole tiles of queries, of keys and of values; 0 where heads and tiles do not go together.
  int heads_together() const;
  // A matrix of 8 bits may be kept as halves.
  void set_matrix(Matrix& matrix, const jaxgpt_linear& linear, int outputs, int inputs, const char* name,
                  bool as_halves = false);
  uint8_t* take_pages(size_t bytes);
  void check_complete();
  // Whether single greedy rows look at the head's upper halves first.
  bool screens() const;
  void bound_screen();
  // Turns the query or key of a head by the angles of a rotary position.
  void turn_by(int position, const float* from, float* to) const;
  void embed_from_head(int token, float* x) const;
  void embed(int token, int position, float* x) const;
};

// Refuses with a message; caught at the C interface.
[[noreturn]] void refuse(const char* format, ...) __attribute__((format(printf, 1, 2)));
