// Attention: a run's queries over the KV cache, and where keys and values lie in it.
#include <algorithm>
#include <cmath>

#include "session.h"

namespace {

int padded16(int n) { return (n + 15) / 16 * 16; }

// The keys of the head whose cache this thread prefetched while it attended with the one before.
thread_local const uint8_t* prefetched_keys = nullptr;

}  // namespace

int jaxgpt_session::cache_blocks() const { return (model.shape.block_size + kBlock - 1) / kBlock; }

// [slot][block of positions][layer][head]: keys, values, their scales
HeadCache jaxgpt_session::cache(int layer, int slot, int head) const {
  const size_t heads = size_t(model.shape.n_head), own = 2 * (head_bytes_ + scale_bytes_);
  const size_t stride = size_t(model.shape.n_layer) * heads * own;
  uint8_t* start = cache_.as<uint8_t>() + size_t(slot) * size_t(cache_blocks()) * stride;
  start += (size_t(layer) * heads + size_t(head)) * own;
  uint8_t* scales = start + 2 * head_bytes_;
  return {start, start + head_bytes_, scales, scales + scale_bytes_, stride};
}

// Puts a run's keys and values of one head into the cache.
void jaxgpt_session::store_kv(int layer, const Run& run, int head) {
  const int n = model.shape.n_embd, D = model.head_size(), width = padded(3 * n);
  const HeadCache place = cache(layer, run.slot, head);
  float rotated[kMaxHeadSize];
  for (int r = 0; r < run.rows; r++) {
    const float* key = wide_.as<float>() + size_t(run.first_row + r) * size_t(width) + n + head * D;
    if (model.shape.rotary) model.apply_rope(run.position + r, key, rotated);
    model.kernels->store_kv(&place, kv_, D, run.position + r, model.shape.rotary ? rotated : key, key + n);
  }
}

// Prefetches a share of the keys and values of a head, unless the thread has: every step drives them out of the caches.
void jaxgpt_session::prefetch_cache(int layer, const Run& run, int head, int part, int parts) const {
  const HeadCache place = cache(layer, run.slot, head);
  if (place.keys == prefetched_keys) return;  // a prefetch of a line that is there takes cycles too
  model.kernels->prefetch_cache(&place, kv_, model.head_size(), run.position, part, parts);
}

// Attention of some rows of a run and one head; keys and values of the whole run are in the cache already. Those of
// `next` are prefetched meanwhile, or, where a single run has few rows, those of the next head.
void jaxgpt_session::attend_run(int layer, const Run& run, int head, int first, int rows, const Run* next) {
  const int D = model.head_size(), Dp = padded16(D), C = padded(model.shape.n_embd);
  const int width = padded(3 * model.shape.n_embd);
  static thread_local std::vector<double> query, scores;
  query.assign(size_t(rows) * size_t(Dp), 0.0);
  scores.resize(kMaxQueries * size_t(padded(run.position + first + rows)));
  const double rate = 1.0 / std::sqrt(double(D));
  for (int r = 0; r < rows; r++) {
    const int row = run.first_row + first + r;
    const float* from = wide_.as<float>() + size_t(row) * size_t(width) + head * D;
    float rotated[kMaxHeadSize];
    if (model.shape.rotary) {
      model.apply_rope(run.position + first + r, from, rotated);
      from = rotated;
    }
    for (int i = 0; i < D; i++) query[size_t(r * Dp + i)] = from[i] * rate;
  }
  HeadCache place = cache(layer, run.slot, head);
  if (next)
    place.next_offset = cache(layer, next->slot, head).keys - place.keys;
  else if (runs_.size() == 1 && run.rows <= kAttentionRows && head + 1 < model.shape.n_head)
    place.next_offset = cache(layer, run.slot, head + 1).keys - place.keys;
  prefetched_keys = place.next_offset ? place.keys + place.next_offset : nullptr;
  float* mixed = mixed_.as<float>() + size_t(run.first_row + first) * size_t(C) + head * D;
  model.kernels->attend(&place, kv_, D, run.position + first, rows, query.data(), scores.data(), mixed, C);
}

// c_attn and attention in one loop, for few rows: a piece makes the queries, keys and values of some heads and
// attends with them at once. It prefetches a share of the cache before each tile, so that attention need not wait.
void jaxgpt_session::fused_qkv_attention(int layer, int rows) {
  const Matrix& matrix = model.layers[size_t(layer)].matrices[JAXGPT_C_ATTN];
  const int heads = model.heads_per_group(), pieces = model.shape.n_head / heads, tiles = 3 * matrix.qkv_tile_group;
  const int width = padded(3 * model.shape.n_embd);
  const int cold = runs_.size() == 1 ? 1 : heads;  // heads that no head of the same piece prefetches
  model.pool.run(pieces, [&](int piece) {
    const int head = piece * heads;
    for (int t = 0; t < tiles; t++) {
      if (t == 2 * matrix.qkv_tile_group)  // keys and values are there; while queries are made, the stores reach the cache
        for (const Run& run : runs_)
          for (int h = head; h < head + heads; h++) store_kv(layer, run, h);
      for (int h = head; h < head + cold; h++) prefetch_cache(layer, runs_[0], h, t, tiles);
      const int tile = piece * tiles + t;
      prefetch_target(wide_.as<float>() + matrix.first_output(tile));
      store_tile(multiply_tile(*model.kernels, matrix, tile, input_, rows), matrix, tile, rows, width);
    }
    for (size_t r = 0; r < runs_.size(); r++)
      for (int h = head; h < head + heads; h++)
        attend_run(layer, runs_[r], h, 0, runs_[r].rows, r + 1 < runs_.size() ? &runs_[r + 1] : nullptr);
  });
}

// Attention after c_attn, for many rows, and for heads that lie across tiles.
void jaxgpt_session::attend(int layer) {
  const int H = model.shape.n_head, runs = int(runs_.size());
  model.pool.run(runs * H, [&](int piece) { store_kv(layer, runs_[size_t(piece / H)], piece % H); });
  const int blocks = (longest_run() + kAttentionRows - 1) / kAttentionRows;
  model.pool.run(runs * H * blocks, [&](int piece) {
    const Run& run = runs_[size_t(piece / (H * blocks))];
    const int first = piece % blocks * kAttentionRows;
    if (first < run.rows)
      attend_run(layer, run, piece / blocks % H, first, std::min(kAttentionRows, run.rows - first));
  });
}
