// One step, for any number of rows: a token of a text, tokens of several texts, a draft, a prompt.
//
//   stream   (rows, C)    x = wte[token] + wpe[position]
//   layer    integers <- round(norm(x));  mixed <- attention of integers * c_attn;  x += round(mixed) * c_proj
//            integers <- round(norm(x));  hidden <- gelu(integers * c_fc);       x += round(hidden) * c_proj
//   head     integers <- round(norm(x));  logits <- integers * head
//
// Each "<-" and "+=" is one loop over pieces that the threads share: rows, tiles of 64 outputs, or heads. A thread that
// waits for the end of one prefetches its tiles of the next matrix. Where a matrix has floats, nothing is rounded.
#include "session.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "runtime/errors.h"

namespace {

size_t element_bytes(int kv) { return kv == JAXGPT_KV_FP32 ? 4 : kv == JAXGPT_KV_FP16 ? 2 : 1; }

}  // namespace

jaxgpt_session::jaxgpt_session(jaxgpt_model& of, int slots, int kv) : model(of), head(of), kv_(kv) {
  lengths_.assign(size_t(slots), 0);
  const int Dp = (model.head_size() + 15) / 16 * 16;
  head_bytes_ = size_t(kBlock) * size_t(Dp) * element_bytes(kv);
  scale_bytes_ = kv == JAXGPT_KV_INT8 ? kBlock * sizeof(float) : 0;
  const size_t blocks = size_t(slots) * size_t(cache_blocks()), of_block = bytes_per_block();
  if (blocks > (size_t(1) << 47) / of_block) throw std::bad_alloc();  // more than there are addresses
  cache_ = Pages(blocks * of_block, true, true);
}

size_t jaxgpt_session::bytes_per_block() const {
  return size_t(model.shape.n_layer) * size_t(model.shape.n_head) * 2 * (head_bytes_ + scale_bytes_);
}

int jaxgpt_session::length(int slot) const {
  if (slot < 0 || slot >= int(lengths_.size())) return -1;
  return __atomic_load_n(&lengths_[size_t(slot)], __ATOMIC_RELAXED);
}

void jaxgpt_session::set_length(int slot, int length) {
  __atomic_store_n(&lengths_[size_t(slot)], length, __ATOMIC_RELAXED);
}

void jaxgpt_session::truncate(int slot, int length) {
  const int now = this->length(slot);
  if (now < 0 || length < 0 || length > now)
    throw_error(JAXGPT_BAD_ARGUMENT, "slot %d cannot be cut to %d tokens", slot, length);
  set_length(slot, length);
}

// The blocks of a slot lie one after the other, so that its first positions are one piece of memory.
void jaxgpt_session::copy(int from, int to, int length) {
  const int have = this->length(from);
  if (have < 0 || length < 0 || length > have)
    throw_error(JAXGPT_BAD_ARGUMENT, "slot %d has no %d tokens to copy", from, length);
  if (this->length(to) < 0) throw_error(JAXGPT_BAD_ARGUMENT, "slot %d is not one of %zu", to, lengths_.size());
  if (from != to) {
    const int blocks = (length + kBlock - 1) / kBlock;
    const uint8_t* source = cache_.as<uint8_t>() + size_t(from) * bytes_per_slot();
    uint8_t* target = cache_.as<uint8_t>() + size_t(to) * bytes_per_slot();
    model.pool.run(blocks, [&](int block) {
      const size_t start = size_t(block) * bytes_per_block();
      memcpy(target + start, source + start, bytes_per_block());
    });
  }
  set_length(to, length);
}

void jaxgpt_session::release(int slot) {
  if (length(slot) < 0) throw_error(JAXGPT_BAD_ARGUMENT, "slot %d is not one of %zu", slot, lengths_.size());
  set_length(slot, 0);
  cache_.release(size_t(slot) * bytes_per_slot(), bytes_per_slot());
}

void jaxgpt_session::touch(int slot, int tokens) {
  if (length(slot) < 0 || tokens < 0 || tokens > model.shape.block_size)
    throw_error(JAXGPT_BAD_ARGUMENT, "slot %d has no %d positions", slot, tokens);
  const int blocks = (tokens + kBlock - 1) / kBlock;
  cache_.touch(size_t(slot) * bytes_per_slot(), size_t(blocks) * bytes_per_block());
}

// Makes scratch for a chunk of `rows` rows.
void jaxgpt_session::reserve(int rows) {
  if (rows <= reserved_) return;
  const size_t C = size_t(padded(model.shape.n_embd)), M = size_t(rows);
  const int widest = 4 * model.shape.n_embd + kTile;
  stream_ = Pages(M * C * sizeof(float), false);
  mixed_ = Pages(M * C * sizeof(float), false);
  wide_ = Pages(M * size_t(padded(widest)) * sizeof(float), false);
  input_.reserve(rows, widest, model.shape.n_embd);
  reserved_ = rows;
}

// Puts the outputs of a tile (rows, 64) where they belong in wide_.
void jaxgpt_session::store_tile(const float* y, const Matrix& matrix, int tile, int rows, int width) {
  float* to = wide_.as<float>() + matrix.first_output(tile);
  for (int m = 0; m < rows; m++) memcpy(to + size_t(m) * size_t(width), y + m * kTile, kTile * sizeof(float));
}

int jaxgpt_session::longest_run() const {
  int longest = 0;
  for (const Run& run : runs_) longest = std::max(longest, run.rows);
  return longest;
}

// Finds the runs of a chunk and fills stream_ with its embeddings.
void jaxgpt_session::embed(int rows, const int32_t* slots, const int32_t* tokens) {
  const int C = padded(model.shape.n_embd);
  runs_.clear();
  for (int m = 0; m < rows; m++) {
    if (m == 0 || slots[m] != slots[m - 1]) runs_.push_back({slots[m], m, 0, lengths_[size_t(slots[m])]});
    Run& run = runs_.back();
    model.embed(tokens[m], run.position + run.rows, stream_.as<float>() + size_t(m) * size_t(C));
    run.rows++;
  }
}

// One layer; `fused`: c_attn and attention are one loop.
void jaxgpt_session::run_layer(int index, int rows, bool fused) {
  const Kernels& k = *model.kernels;
  const int C = padded(model.shape.n_embd), n = model.shape.n_embd;
  const int qkv_width = padded(3 * n), hidden_width = padded(4 * n);
  float* stream = stream_.as<float>();
  const Layer& layer = model.layers[size_t(index)];
  const Matrix &c_attn = layer.matrices[JAXGPT_C_ATTN], &attn_c_proj = layer.matrices[JAXGPT_ATTN_C_PROJ];
  const Matrix &c_fc = layer.matrices[JAXGPT_C_FC], &mlp_c_proj = layer.matrices[JAXGPT_MLP_C_PROJ];
  const auto of_stream = [&](int tile) { return stream + tile * kTile; };
  const auto add_to_stream = [&](int tile, const float* y) {
    for (int m = 0; m < rows; m++) k.add(y + m * kTile, kTile, stream + size_t(m) * size_t(C) + tile * kTile);
  };
  input_.take(model, c_attn, stream, C, rows, &layer.norms[0]);
  model.prefetch_tiles(attn_c_proj);
  if (fused) {
    fused_qkv_attention(index, rows);
  } else {
    multiply(
        model, c_attn, input_, rows, [&](int tile) { return wide_.as<float>() + c_attn.first_output(tile); },
        [&](int tile, const float* y) { store_tile(y, c_attn, tile, rows, qkv_width); });
    attend(index);
  }
  input_.take(model, attn_c_proj, mixed_.as<float>(), C, rows, nullptr);
  model.prefetch_tiles(c_fc);
  multiply(model, attn_c_proj, input_, rows, of_stream, add_to_stream);
  input_.take(model, c_fc, stream, C, rows, &layer.norms[1]);
  model.prefetch_tiles(mlp_c_proj);
  multiply(
      model, c_fc, input_, rows, [&](int tile) { return wide_.as<float>() + c_fc.first_output(tile); },
      [&](int tile, float* y) {
        k.gelu(y, rows * kTile);
        store_tile(y, c_fc, tile, rows, hidden_width);
      });
  input_.take(model, mlp_c_proj, wide_.as<float>(), hidden_width, rows, nullptr);
  if (index + 1 < model.shape.n_layer)
    model.prefetch_qkv(index + 1);
  else
    model.prefetch_tiles(model.head);
  multiply(model, mlp_c_proj, input_, rows, of_stream, add_to_stream);
}

// Takes up to kChunk rows through all layers; stream_ has the result.
void jaxgpt_session::chunk(int rows, const int32_t* slots, const int32_t* tokens) {
  reserve(rows);
  embed(rows, slots, tokens);
  const bool fused = model.heads_per_group() && longest_run() <= kAttentionRows;
  for (int index = 0; index < model.shape.n_layer; index++) run_layer(index, rows, fused);
  for (const Run& run : runs_) set_length(run.slot, length(run.slot) + run.rows);
}

// Logits of the wanted rows of a chunk, or the most probable token of each.
void jaxgpt_session::predict(int rows, const uint8_t* wanted, float* logits, int32_t* best) {
  const int C = padded(model.shape.n_embd);
  float* stream = stream_.as<float>();
  int count = 0;
  for (int m = 0; m < rows; m++)
    if (wanted[m]) {
      if (count != m) memcpy(stream + size_t(count) * size_t(C), stream + size_t(m) * size_t(C), size_t(C) * 4);
      count++;
    }
  if (!count) return;
  input_.take(model, model.head, stream, C, count, &model.last_norm);
  head.predict(input_, count, logits, best);
}

// Before anything is taken: every slot and token is one, rows of a slot are neighbours, and the contexts have room.
void jaxgpt_session::check_rows(int rows, const int32_t* slots, const int32_t* tokens) const {
  std::vector<int> room(lengths_.size());
  for (size_t slot = 0; slot < lengths_.size(); slot++) room[slot] = model.shape.block_size - lengths_[slot];
  std::vector<uint8_t> seen(lengths_.size(), 0);
  for (int m = 0; m < rows; m++) {
    const int slot = slots[m];
    if (slot < 0 || slot >= int(lengths_.size()))
      throw_error(JAXGPT_BAD_ARGUMENT, "slot %d is not one of %zu", slot, lengths_.size());
    if (m == 0 || slots[m - 1] != slot) {
      if (seen[size_t(slot)]) throw_error(JAXGPT_BAD_ARGUMENT, "rows of slot %d are not neighbours", slot);
      seen[size_t(slot)] = 1;
    }
    if (tokens[m] < 0 || tokens[m] >= model.shape.vocab_size)
      throw_error(JAXGPT_BAD_ARGUMENT, "token %d is not in a vocabulary of %d", tokens[m], model.shape.vocab_size);
    if (--room[size_t(slot)] < 0)
      throw_error(JAXGPT_BAD_STATE, "slot %d would have more tokens than the context of %d holds", slot,
                  model.shape.block_size);
  }
}

void jaxgpt_session::forward(int rows, const int32_t* slots, const int32_t* tokens, const uint8_t* wanted,
                             float* logits, int32_t* best) {
  std::lock_guard<std::mutex> lock(model.step_mutex);  // before lengths are read: another thread may change them
  check_rows(rows, slots, tokens);
  int taken = 0;
  try {
    for (int first = 0; first < rows; first = taken) {
      const int now = std::min(kChunk, rows - first);
      chunk(now, slots + first, tokens + first);
      taken += now;
      int count = 0;
      for (int m = 0; m < now; m++) count += wanted[first + m] != 0;
      predict(now, wanted + first, logits, best);
      if (logits) logits += size_t(count) * size_t(model.shape.vocab_size);
      if (best) best += count;
    }
  } catch (...) {
    for (int m = 0; m < taken; m++) set_length(slots[m], length(slots[m]) - 1);
    throw;
  }
}

int jaxgpt_session::decode_greedy(int slot, int32_t token, int max_tokens, int32_t stop_token, int32_t* tokens) {
  const int before = length(slot);
  if (before >= 0 && max_tokens > model.shape.block_size - before)
    throw_error(JAXGPT_BAD_STATE, "slot %d would have more tokens than the context of %d holds", slot,
                model.shape.block_size);
  const uint8_t wanted = 1;
  int count = 0;
  try {
    while (count < max_tokens && (count == 0 || token != stop_token)) {
      forward(1, &slot, &token, &wanted, nullptr, &tokens[count]);
      token = tokens[count++];
    }
  } catch (...) {
    std::lock_guard<std::mutex> lock(model.step_mutex);
    if (before >= 0 && before <= length(slot)) set_length(slot, before);
    throw;
  }
  return count;
}
