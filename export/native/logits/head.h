// The head: logits of rows, or only the most probable token of each, with or without its screen (see head.cpp).
#pragma once

#include <vector>

#include "tiles/product.h"

// Belongs to a session: whether the screen pays is a matter of the text that is generated.
class Head {
 public:
  explicit Head(jaxgpt_model& model) : model_(model) {}

  // Of `rows` rows that are quantized for the head. A screened row's residual is overwritten where it has none.
  //   logits  (rows, vocab_size), or null
  //   best    (rows) the argmax of each, the first of equals; or null
  void predict(InputRows& x, int rows, float* logits, int32_t* best);

  // Whether single rows of which only the argmax is wanted go through the screen.
  void use_screen(bool use);
  // Outputs that screened rows computed exactly so far.
  int64_t exact_outputs() const { return kColumn * exact_columns_; }

  // The first pass of the screen over a single row: an upper bound of each logit, (tiles x 64), -inf beyond the
  // vocabulary. Public for its test.
  const std::vector<float>& screen(InputRows& x);

 private:
  bool screens() const;
  void bound_screen();
  void exact_column(const InputRows& x, int column, float* y) const;
  int argmax_of_column(const InputRows& x, int column, float* max) const;
  void collect_candidates(float threshold);
  int screened_argmax(InputRows& x);
  bool back_off(bool too_many);

  jaxgpt_model& model_;
  std::vector<float> logits_;       // where nobody asked for them
  std::vector<float> lane_max_;     // of each row, tile and lane
  std::vector<float> upper_bound_;  // of each output
  std::vector<float> tile_max_;     // of the bounds
  std::vector<int> candidates_;     // columns that are computed exactly
  int64_t exact_columns_ = 0;
  bool use_screen_ = true;
  int backoff_ = 0, backoff_left_ = 0;  // steps without the screen: at the last time, still to come
};
