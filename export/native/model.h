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
  float input_scale = 0;
  Pages weight;
  std::vector<float> weight_scale;  // 8 bits: (padded outputs)
  std::vector<uint16_t> steps;      // 4 bits: [tile][group][64]
  std::vector<float> bias;          // (padded outputs), zeros without one
  std::vector<float> smooth;        // empty without one

  int tiles() const { return padded(outputs) / kTile; }
  int groups() const { return (padded(inputs) + group - 1) / group; }
  // The rows of integers that a row of input becomes.
  int parts() const { return fine ? 2 : 1; }
  const uint8_t* tile(int t) const { return weight.as<uint8_t>() + size_t(t) * tile_bytes(inputs, bits); }
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
  Pool pool;
  std::mutex turn;  // held by the session that runs
  std::vector<Layer> layers;
  Norm last_norm;
  Matrix head;
  std::vector<int8_t> token_rows, position_rows;
  std::vector<float> token_scale, position_scale, token_smooth;
  std::vector<float> turns;
  bool tokens_set = false;
  int64_t bytes_read = 0;

  int head_size() const { return shape.n_embd / shape.n_head; }
  void set_matrix(Matrix& matrix, const jaxgpt_linear& linear, int outputs, int inputs, const char* name);
  void check_complete();
  void embed(int token, int position, float* x) const;
};

// Refuses with a message; caught at the C interface.
[[noreturn]] void refuse(const char* format, ...) __attribute__((format(printf, 1, 2)));
