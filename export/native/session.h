// A session: the keys and values of some texts (slots), and the step that takes more tokens.
#pragma once

#include <vector>

#include "logits/head.h"
#include "tiles/product.h"

constexpr int kAttentionRows = 32;  // of a piece of attention

// Rows of one slot that follow each other in a chunk.
struct Run {
  int slot, first_row, rows, position;
};

struct jaxgpt_session {
  jaxgpt_session(jaxgpt_model& model, int slots, int kv);

  // See engine.h; takes model.step_mutex.
  void forward(int rows, const int32_t* slots, const int32_t* tokens, const uint8_t* wanted, float* logits,
               int32_t* best);
  // Returns how many tokens it made.
  int decode_greedy(int slot, int32_t token, int max_tokens, int32_t stop_token, int32_t* tokens);
  void truncate(int slot, int length);
  int length(int slot) const;  // -1 where there is no such slot; needs no lock
  void copy(int from, int to, int length);
  void release(int slot);
  void touch(int slot, int tokens);
  // Bytes of keys and values of a position, in all layers.
  size_t bytes_per_token() const { return bytes_per_block() / kBlock; }

  jaxgpt_model& model;
  Head head;

 private:
  void check_rows(int rows, const int32_t* slots, const int32_t* tokens) const;
  void chunk(int rows, const int32_t* slots, const int32_t* tokens);
  void embed(int rows, const int32_t* slots, const int32_t* tokens);
  void run_layer(int index, int rows, bool fused);
  void predict(int rows, const uint8_t* wanted, float* logits, int32_t* best);
  void reserve(int rows);
  void store_tile(const float* y, const Matrix& matrix, int tile, int rows, int width);
  int longest_run() const;

  // attention.cpp
  int cache_blocks() const;
  size_t bytes_per_block() const;  // of all layers and heads
  size_t bytes_per_slot() const { return size_t(cache_blocks()) * bytes_per_block(); }
  void set_length(int slot, int length);
  HeadCache cache(int layer, int slot, int head) const;
  void fused_qkv_attention(int layer, int rows);
  void attend(int layer);
  void attend_run(int layer, const Run& run, int head, int first, int rows, const Run* next = nullptr);
  void store_kv(int layer, const Run& run, int head);
  void prefetch_cache(int layer, const Run& run, int head, int part, int parts) const;

  const int kv_;  // JAXGPT_KV_*
  std::vector<int> lengths_;  // of each slot
  Pages cache_;
  size_t head_bytes_, scale_bytes_;  // keys (or values) of a block of positions, and their scales
  std::vector<Run> runs_;            // of the chunk
  // Scratch of a chunk; widths are padded.
  int reserved_ = 0;
  Pages stream_;  // (rows, C)   the residual stream
  Pages wide_;    // (rows, 4 C) queries, keys and values, or what GELU gives
  Pages mixed_;   // (rows, C)   what attention gives
  InputRows input_;
};
