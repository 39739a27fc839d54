// A session: the keys and values of some texts, and the step that takes more tokens.
#pragma once

#include <vector>

#include "model.h"

constexpr int kLargestHead = 512;  // channels; larger ones are refused
constexpr int kChunk = 256;  // rows that a prompt takes at once: scratch stays small, and weights are read rarely

// Rows of one slot that follow each other in a chunk.
struct Run {
  int slot, first_row, rows, position;
};

struct jaxgpt_session {
  jaxgpt_session(jaxgpt_model& model, int slots, int kv);

  void forward(int rows, const int32_t* slots, const int32_t* tokens, const uint8_t* wanted, float* logits,
               int32_t* best);

  jaxgpt_model& model;
  const int kv;
  std::vector<int> lengths;  // of each slot
  int64_t columns_read = 0;  // 16 outputs each that screened steps computed exactly

 private:
  void chunk(int rows, const int32_t* slots, const int32_t* tokens);
  void make_room(int rows);
  void round_rows(const Matrix& matrix, const float* x, int x_width, int rows, const Norm* norm);
  void expect_tiles(const Matrix& matrix);
  void expect_heads(int layer);
  template <typename Finish>
  void multiply(const Matrix& matrix, int rows, const Finish& finish);
  const uint8_t* joined(const Matrix& matrix, int tile, int first, int outputs) const;
  float* multiply_tile(const Matrix& matrix, int tile, int rows);
  void put_tile(const float* y, const Matrix& matrix, int tile, int rows, int width);
  void attend_together(int layer, int rows);
  void attend(int layer);
  void ask_for_cache(int layer, const Run& run, int head, int part, int parts) const;
  void remember(int layer, const Run& run, int head);
  void attend_run(int layer, const Run& run, int head, int first, int rows, const Run* next = nullptr);
  int cache_blocks() const;
  HeadCache cache(int layer, int slot, int head) const;
  void exact_column(int column, float* y) const;
  int best_of_column(int column, float* most) const;
  int screened_best();
  void predict(int rows, const uint8_t* wanted, float* logits, int32_t* best);

  Pages cache_;
  size_t head_bytes_, scale_bytes_;  // keys (or values) of a block of positions, and their steps
  std::vector<Run> runs_;
  // Scratch of a chunk; widths are padded.
  int room_ = 0;
  Pages stream_, wide_, mixed_, integers_;
  std::vector<RowStep> steps_;
  std::vector<int32_t> starts_, group_sums_;
  // Of the head: logits that nobody asked for, and the largest of each lane of each tile.
  std::vector<float> logits_, lanes_;
  // Of the screen: bounds, the largest of each tile, what is computed exactly; steps to go without it.
  std::vector<float> upper_, most_;
  std::vector<int> columns_;
  int rest_ = 0, resting_ = 0;
};

// Calls finish(tile, y) with y (rows, 64) for every tile.
template <typename Finish>
void jaxgpt_session::multiply(const Matrix& matrix, int rows, const Finish& finish) {
  model.pool.run(matrix.tiles(), [&](int tile) { finish(tile, multiply_tile(matrix, tile, rows)); });
}
