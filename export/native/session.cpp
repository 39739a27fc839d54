// One step, for any number of rows: a token of a text, tokens of several texts, a draft, a prompt.
//
//   stream   (rows, C)    x = wte[token] + wpe[position]
//   layer    integers <- round(norm(x));  mixed <- attention of integers * c_attn;  x += round(mixed) * c_proj
//            integers <- round(norm(x));  hidden <- gelu(integers * c_fc);       x += round(hidden) * c_proj
//   head     integers <- round(norm(x));  logits <- integers * head
//
// Each "<-" and "+=" is one loop over pieces that the threads share: rows, tiles of 64 outputs, or heads. A thread that
// waits for the end of one asks for its tiles of the next matrix.
#include "session.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

namespace {

constexpr int kAttendRows = 32;  // of a piece of attention

size_t element_bytes(int kv) { return kv == JAXGPT_KV_FLOAT ? 4 : kv == JAXGPT_KV_HALF ? 2 : 1; }

int padded16(int n) { return (n + 15) / 16 * 16; }

}  // namespace

jaxgpt_session::jaxgpt_session(jaxgpt_model& of, int slots, int chosen) : model(of), kv(chosen) {
  const auto& shape = model.shape;
  lengths.assign(size_t(slots), 0);
  head_bytes_ = size_t(kBlock) * size_t(padded16(model.head_size())) * element_bytes(kv);
  scale_bytes_ = kv == JAXGPT_KV_INT8 ? kBlock * sizeof(float) : 0;
  const size_t blocks = size_t(slots) * size_t(cache_blocks());
  const size_t of_block = size_t(shape.n_layer) * size_t(shape.n_head) * 2 * (head_bytes_ + scale_bytes_);
  if (blocks > (size_t(1) << 47) / of_block) throw std::bad_alloc();  // more than there are addresses
  cache_ = Pages(blocks * of_block, true);
}

int jaxgpt_session::cache_blocks() const { return (model.shape.block_size + kBlock - 1) / kBlock; }

// [slot][block of positions][layer][head]: keys, values, their steps
HeadCache jaxgpt_session::cache(int layer, int slot, int head) const {
  const size_t heads = size_t(model.shape.n_head), own = 2 * (head_bytes_ + scale_bytes_);
  const size_t stride = size_t(model.shape.n_layer) * heads * own;
  uint8_t* start = cache_.as<uint8_t>() + size_t(slot) * size_t(cache_blocks()) * stride;
  start += (size_t(layer) * heads + size_t(head)) * own;
  uint8_t* scales = start + 2 * head_bytes_;
  return {start, start + head_bytes_, scales, scales + scale_bytes_, stride};
}

void jaxgpt_session::make_room(int rows) {
  if (rows <= room_) return;
  const auto& shape = model.shape;
  const size_t C = size_t(padded(shape.n_embd)), M = size_t(rows), widest = 4 * size_t(shape.n_embd) + kTile;
  stream_ = Pages(M * C * sizeof(float), false);
  mixed_ = Pages(M * C * sizeof(float), false);
  wide_ = Pages(M * size_t(padded(int(widest))) * sizeof(float), false);
  integers_ = Pages(2 * M * size_t(padded(int(widest))), false);
  steps_.resize(M);
  starts_.resize(2 * M);
  room_ = rows;
}

// Normalizes (where there is a norm) and rounds rows into integers_, steps_ and starts_.
void jaxgpt_session::round_rows(const Matrix& matrix, const float* x, int x_width, int rows, const Norm* norm) {
  const Kernels& k = *model.kernels;
  const int n = matrix.inputs, width = padded(n), parts = matrix.parts();
  const int groups = matrix.bits == 4 ? matrix.groups() : 0;
  group_sums_.resize(size_t(rows) * size_t(groups));
  const auto round_row = [&](int m) {
    const float* row = x + size_t(m) * size_t(x_width);
    int8_t* q = integers_.as<int8_t>() + size_t(m) * size_t(parts) * size_t(width);
    int8_t* fine = matrix.fine ? q + width : nullptr;
    const float* smooth = matrix.smooth.empty() ? nullptr : matrix.smooth.data();
    RowStep& step = steps_[size_t(m)];
    if (norm) {
      float* place = mixed_.as<float>() + size_t(m) * size_t(padded(model.shape.n_embd));
      k.layer_norm(row, norm->gain.data(), norm->bias.data(), n, place);
      row = place;
    }
    k.quantize(row, smooth, n, matrix.input_scale, q, fine, &step);
    starts_[size_t(m) * size_t(parts)] = step.start;
    if (fine) starts_[size_t(m) * 2 + 1] = step.fine_start;
    if (groups) k.sum_groups(q, fine, width, matrix.group, &group_sums_[size_t(m) * size_t(groups)]);
  };
  if (rows < 4)
    for (int m = 0; m < rows; m++) round_row(m);
  else
    model.pool.run(rows, round_row);
}

// The bytes of some outputs of a tile of halves; they stay until this thread joins others.
const uint8_t* jaxgpt_session::joined(const Matrix& matrix, int tile, int first, int outputs) const {
  static thread_local std::vector<uint8_t> whole;
  whole.resize(size_t(kTile) * size_t(padded(matrix.inputs)));
  model.kernels->join(matrix.weights(tile), matrix.lower(tile), padded(matrix.inputs), first, outputs, whole.data());
  return whole.data();
}

// y (rows, 64) of one tile; it stays until this thread's next tile.
float* jaxgpt_session::multiply_tile(const Matrix& matrix, int tile, int rows) {
  alignas(64) static thread_local int32_t sums[2 * kChunk * kTile];
  alignas(64) static thread_local float y[kChunk * kTile];
  const Kernels& k = *model.kernels;
  const int width = padded(matrix.inputs), parts = matrix.parts();
  const int8_t* x = integers_.as<int8_t>();
  if (matrix.bits == 4) {
    auto* floats = reinterpret_cast<float*>(sums);
    k.dot4(matrix.weights(tile), matrix.steps4(tile), width, matrix.group, x, width, rows, group_sums_.data(), floats);
    for (int m = 0; m < rows; m++)
      k.finish4(floats + m * kTile, steps_[size_t(m)].scale, matrix.bias(tile), y + m * kTile);
    return y;
  }
  const int all = rows * parts;
  const bool many = k.many_from && all >= k.many_from;
  if (matrix.halves && k.dot_halves && !many) {
    k.dot_halves(matrix.weights(tile), matrix.lower(tile), width, x, width, all, starts_.data(), sums);
  } else {
    const uint8_t* weights = matrix.halves ? joined(matrix, tile, 0, kTile) : matrix.weights(tile);
    (many ? k.many : k.dot8)(weights, width, x, width, all, starts_.data(), sums);
  }
  for (int m = 0; m < rows; m++) {
    const int32_t* own = sums + m * parts * kTile;
    k.finish8(own, matrix.fine ? own + kTile : nullptr, steps_[size_t(m)].scale, matrix.steps8(tile),
              matrix.bias(tile), y + m * kTile);
  }
  return y;
}

// Attention of some rows of a run and one head; keys and values of the whole run are in the cache already. Those of
// `next` are asked for meanwhile, where it is not null.
void jaxgpt_session::attend_run(int layer, const Run& run, int head, int first, int rows, const Run* next) {
  const int D = model.head_size(), Dp = padded16(D), C = padded(model.shape.n_embd);
  const int width = padded(3 * model.shape.n_embd);
  static thread_local std::vector<double> query, scores;
  query.assign(size_t(rows) * size_t(Dp), 0.0);
  scores.resize(4 * size_t(padded(run.position + first + rows)));
  const double rate = 1.0 / std::sqrt(double(D));
  for (int r = 0; r < rows; r++) {
    const int row = run.first_row + first + r;
    const float* from = wide_.as<float>() + size_t(row) * size_t(width) + head * D;
    float turned[kLargestHead];
    if (model.shape.rotary) {
      model.turn_by(run.position + first + r, from, turned);
      from = turned;
    }
    for (int i = 0; i < D; i++) query[size_t(r * Dp + i)] = from[i] * rate;
  }
  HeadCache place = cache(layer, run.slot, head);
  if (next) place.ahead = cache(layer, next->slot, head).keys - place.keys;
  float* mixed = mixed_.as<float>() + size_t(run.first_row + first) * size_t(C) + head * D;
  model.kernels->attend(&place, kv, D, run.position + first, rows, query.data(), scores.data(), mixed, C);
}

// Puts the outputs of a tile (rows, 64) where they belong in wide_.
void jaxgpt_session::put_tile(const float* y, const Matrix& matrix, int tile, int rows, int width) {
  float* to = wide_.as<float>() + matrix.first_output(tile);
  for (int m = 0; m < rows; m++) memcpy(to + size_t(m) * size_t(width), y + m * kTile, kTile * sizeof(float));
}

// Puts a run's keys and values of one head into the cache.
void jaxgpt_session::remember(int layer, const Run& run, int head) {
  const int n = model.shape.n_embd, D = model.head_size(), width = padded(3 * n);
  const HeadCache place = cache(layer, run.slot, head);
  float turned[kLargestHead];
  for (int r = 0; r < run.rows; r++) {
    const float* key = wide_.as<float>() + size_t(run.first_row + r) * size_t(width) + n + head * D;
    if (model.shape.rotary) model.turn_by(run.position + r, key, turned);
    model.kernels->remember(&place, kv, D, run.position + r, model.shape.rotary ? turned : key, key + n);
  }
}

// Asks for a share of the keys and values of a head, which would not be near: every step drives them out.
void jaxgpt_session::ask_for_cache(int layer, const Run& run, int head, int part, int parts) const {
  const HeadCache place = cache(layer, run.slot, head);
  model.kernels->ask_for(&place, kv, model.head_size(), run.position, part, parts);
}

// c_attn and attention in one loop, for few rows: a piece makes the queries, keys and values of some heads and
// attends with them at once. It asks for a share of the cache before each tile, so that attention need not wait.
void jaxgpt_session::attend_together(int layer, int rows) {
  const Matrix& matrix = model.layers[size_t(layer)].matrices[JAXGPT_C_ATTN];
  const int heads = model.heads_together(), pieces = model.shape.n_head / heads, tiles = 3 * matrix.thirds;
  const int width = padded(3 * model.shape.n_embd);
  model.pool.run(pieces, [&](int piece) {
    const int head = piece * heads;
    for (int t = 0; t < tiles; t++) {
      if (t == 2 * matrix.thirds)  // keys and values are there; while queries are made, the stores come to rest
        for (const Run& run : runs_)
          for (int h = head; h < head + heads; h++) remember(layer, run, h);
      for (int h = head; h < head + heads; h++) ask_for_cache(layer, runs_[0], h, t, tiles);
      put_tile(multiply_tile(matrix, piece * tiles + t, rows), matrix, piece * tiles + t, rows, width);
    }
    for (size_t r = 0; r < runs_.size(); r++)
      for (int h = head; h < head + heads; h++)
        attend_run(layer, runs_[r], h, 0, runs_[r].rows, r + 1 < runs_.size() ? &runs_[r + 1] : nullptr);
  });
}

// Attention after c_attn, for many rows, and for heads that lie across tiles.
void jaxgpt_session::attend(int layer) {
  const int H = model.shape.n_head, runs = int(runs_.size());
  int most = 0;
  for (const Run& run : runs_) most = std::max(most, run.rows);
  model.pool.run(runs * H, [&](int piece) { remember(layer, runs_[size_t(piece / H)], piece % H); });
  const int blocks = (most + kAttendRows - 1) / kAttendRows;
  model.pool.run(runs * H * blocks, [&](int piece) {
    const Run& run = runs_[size_t(piece / (H * blocks))];
    const int first = piece % blocks * kAttendRows;
    if (first < run.rows)
      attend_run(layer, run, piece / blocks % H, first, std::min(kAttendRows, run.rows - first));
  });
}

// What the loop after the next reads: see Pool::expect.
void jaxgpt_session::expect_tiles(const Matrix& matrix) {
  model.pool.expect(matrix.tile(0), matrix.tile_bytes(), matrix.tiles());
}

void jaxgpt_session::expect_heads(int layer) {
  const Matrix& matrix = model.layers[size_t(layer)].matrices[JAXGPT_C_ATTN];
  const int together = std::max(1, 3 * matrix.thirds);
  model.pool.expect(matrix.tile(0), size_t(together) * matrix.tile_bytes(), matrix.tiles() / together);
}

// Takes up to kChunk rows through all layers; stream_ has the result.
void jaxgpt_session::chunk(int rows, const int32_t* slots, const int32_t* tokens) {
  const Kernels& k = *model.kernels;
  const int C = padded(model.shape.n_embd), n = model.shape.n_embd;
  make_room(rows);
  float* stream = stream_.as<float>();
  float* wide = wide_.as<float>();
  runs_.clear();
  for (int m = 0; m < rows; m++) {
    if (m == 0 || slots[m] != slots[m - 1]) runs_.push_back({slots[m], m, 0, lengths[size_t(slots[m])]});
    Run& run = runs_.back();
    model.embed(tokens[m], run.position + run.rows, stream + size_t(m) * size_t(C));
    run.rows++;
  }
  int most = 0;
  for (const Run& run : runs_) most = std::max(most, run.rows);
  const bool together = model.heads_together() && most <= kAttendRows;
  const int qkv_width = padded(3 * n), hidden_width = padded(4 * n);
  const auto onto_stream = [&](int tile, const float* y) {
    for (int m = 0; m < rows; m++) k.add(y + m * kTile, kTile, stream + size_t(m) * size_t(C) + tile * kTile);
  };
  const auto hidden = [&](int tile, float* y) {
    k.gelu(y, rows * kTile);
    put_tile(y, model.layers[0].matrices[JAXGPT_C_FC], tile, rows, hidden_width);
  };
  for (int index = 0; index < model.shape.n_layer; index++) {
    const Layer& layer = model.layers[size_t(index)];
    const Matrix* matrices = layer.matrices;
    round_rows(matrices[JAXGPT_C_ATTN], stream, C, rows, &layer.norms[0]);
    expect_tiles(matrices[JAXGPT_ATTN_C_PROJ]);
    if (together) {
      attend_together(index, rows);
    } else {
      multiply(matrices[JAXGPT_C_ATTN], rows, [&](int tile, const float* y) {
        put_tile(y, matrices[JAXGPT_C_ATTN], tile, rows, qkv_width);
      });
      attend(index);
    }
    round_rows(matrices[JAXGPT_ATTN_C_PROJ], mixed_.as<float>(), C, rows, nullptr);
    expect_tiles(matrices[JAXGPT_C_FC]);
    multiply(matrices[JAXGPT_ATTN_C_PROJ], rows, onto_stream);
    round_rows(matrices[JAXGPT_C_FC], stream, C, rows, &layer.norms[1]);
    expect_tiles(matrices[JAXGPT_MLP_C_PROJ]);
    multiply(matrices[JAXGPT_C_FC], rows, hidden);
    round_rows(matrices[JAXGPT_MLP_C_PROJ], wide, hidden_width, rows, nullptr);
    if (index + 1 < model.shape.n_layer)
      expect_heads(index + 1);
    else
      expect_tiles(model.head);
    multiply(matrices[JAXGPT_MLP_C_PROJ], rows, onto_stream);
  }
  for (const Run& run : runs_) lengths[size_t(run.slot)] += run.rows;
}

void jaxgpt_session::forward(int rows, const int32_t* slots, const int32_t* tokens, const uint8_t* wanted,
                             float* logits, int32_t* best) {
  std::lock_guard<std::mutex> lock(model.turn);  // before the lengths are looked at: another thread may change them
  std::vector<int> room(lengths.size());
  for (size_t slot = 0; slot < lengths.size(); slot++) room[slot] = model.shape.block_size - lengths[slot];
  std::vector<uint8_t> seen(lengths.size(), 0);
  for (int m = 0; m < rows; m++) {
    const int slot = slots[m];
    if (slot < 0 || slot >= int(lengths.size())) refuse("slot %d is not one of %zu", slot, lengths.size());
    if (m == 0 || slots[m - 1] != slot) {
      if (seen[size_t(slot)]) refuse("rows of slot %d are not neighbours", slot);
      seen[size_t(slot)] = 1;
    }
    if (tokens[m] < 0 || tokens[m] >= model.shape.vocab_size)
      refuse("token %d is not in a vocabulary of %d", tokens[m], model.shape.vocab_size);
    if (--room[size_t(slot)] < 0)
      refuse("slot %d would have more tokens than the context of %d holds", slot, model.shape.block_size);
  }
  for (int first = 0; first < rows; first += kChunk) {
    const int now = std::min(kChunk, rows - first);
    chunk(now, slots + first, tokens + first);
    int count = 0;
    for (int m = 0; m < now; m++) count += wanted[first + m] != 0;
    predict(now, wanted + first, logits, best);
    if (logits) logits += size_t(count) * size_t(model.shape.vocab_size);
    if (best) best += count;
  }
}
