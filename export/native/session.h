// A session: the keys and values of some texts, and the step that takes more tokens.
#pragma once

#include <vector>

#include "model.h"

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

 private:
  void chunk(int rows, const int32_t* slots, const int32_t* tokens);
  void make_room(int rows);
  void round_rows(const Matrix& matrix, const float* x, int x_width, int rows, const Norm* norm);
  template <typename Finish>
  void multiply(const Matrix& matrix, int rows, const Finish& finish);
  void multiply_tile(const Matrix& matrix, int tile, int rows, float* y, int32_t* sums);
  void attention(int layer);
  void ask_for_cache(int layer, int tile, int tiles) const;
  void attend_run(int layer, const Run& run, int head, int first, int rows);
  int cache_blocks() const;
  HeadCache cache(int layer, int slot, int head) const;
  void predict(int rows, const uint8_t* wanted, float* logits, int32_t* best);

  Pages cache_;
  size_t head_bytes_, scale_bytes_;  // keys (or values) of a block of positions, and their steps
  std::vector<Run> runs_;
  // Scratch of a chunk; widths are padded.
  int room_ = 0;
  Pages stream_, wide_, mixed_, integers_;
  std::vector<RowStep> steps_;
  std::vector<int32_t> starts_, group_sums_;
};
