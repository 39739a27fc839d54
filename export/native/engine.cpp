// The C interface: checks what it is given, turns exceptions into messages.
#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>
#include <new>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "session.h"

namespace {

thread_local std::string error_text;

template <typename Body>
int guarded(const Body& body) {
  try {
    body();
    return 0;
  } catch (const std::bad_alloc&) {
    error_text = "there is not enough memory";
  } catch (const std::exception& error) {
    error_text = error.what();
  }
  return -1;
}

const Kernels* chosen_kernels(const char* isa) {
  const Kernels* kernels = find_kernels(isa);
  if (!kernels)
    refuse("instruction set %s is not there; expected one of: %s", isa ? isa : "", jaxgpt_instruction_sets());
  return kernels;
}

constexpr int kMostThreads = 1024;

// Refuses a null among what must be there.
template <typename... Pointers>
void need(const Pointers*... pointers) {
  if ((... || !pointers)) refuse("a pointer that is needed is null");
}

// A model whose weights are still being set.
void need_open(const jaxgpt_model* model) {
  need(model);
  if (model->ready) refuse("the model is ready: its weights are set already");
}

void check_shape(const jaxgpt_shape& s) {
  constexpr int kMost = 1 << 20;
  if (s.n_layer < 1 || s.n_layer > 4096 || s.n_head < 1 || s.n_embd < 1 || s.n_embd > 1 << 15 ||
      s.block_size < 1 || s.block_size > kMost || s.vocab_size < 1 || s.vocab_size > 1 << 24)
    refuse("a model of %d layers, %d heads, %d channels, %d positions, %d tokens is none", s.n_layer, s.n_head,
           s.n_embd, s.block_size, s.vocab_size);
  if (s.n_embd % s.n_head || s.n_embd / s.n_head > kLargestHead)
    refuse("%d channels cannot be shared by %d heads of up to %d", s.n_embd, s.n_head, kLargestHead);
  if (s.rotary && s.n_embd / s.n_head % 2) refuse("rotary positions want an even head size");
}

void set_norm(Norm& norm, const float* gain, const float* bias, int n) {
  if (!gain || !bias) refuse("a norm has no gain or no bias");
  norm.gain.assign(gain, gain + n);
  norm.bias.assign(bias, bias + n);
}

#if defined(__x86_64__)
// F16C, which not every compiler's __builtin_cpu_supports knows by name.
bool converts_halves() {
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

}  // namespace

const char* jaxgpt_error(void) { return error_text.c_str(); }
int jaxgpt_version(void) { return JAXGPT_ENGINE_VERSION; }

const Kernels* const* kernels_here() {
  static const Kernels* found[4] = {};
  static const bool once = [] {
    int n = 0;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni"))
      found[n++] = avx512_kernels();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && converts_halves())
      found[n++] = avx2_kernels();
#endif
#if defined(__aarch64__)
    if (const Kernels* neon = neon_kernels()) found[n++] = neon;
#endif
    found[n] = portable_kernels();
    return true;
  }();
  (void)once;
  return found;
}

const Kernels* find_kernels(const char* name) {
  for (const Kernels* const* k = kernels_here(); *k; k++)
    if (!name || !strcmp(name, (*k)->name)) return *k;
  return nullptr;
}

const char* jaxgpt_instruction_sets(void) {
  static const std::string names = [] {
    std::string all;
    for (const Kernels* const* k = kernels_here(); *k; k++) all += (all.empty() ? "" : " ") + std::string((*k)->name);
    return all;
  }();
  return names.c_str();
}

int jaxgpt_model_new(const jaxgpt_shape* shape, const char* isa, int threads, jaxgpt_model** model) {
  return guarded([&] {
    need(shape, model);
    check_shape(*shape);
    if (threads < 1 || threads > kMostThreads) refuse("%d threads are none", threads);
    *model = new jaxgpt_model(*shape, chosen_kernels(isa), threads);
  });
}

int jaxgpt_model_set_norm(jaxgpt_model* model, int which, int layer, const float* gain, const float* bias) {
  return guarded([&] {
    need_open(model);
    if (which != JAXGPT_LN_F && (layer < 0 || layer >= model->shape.n_layer || which < 0 || which > JAXGPT_LN_2))
      refuse("norm %d of layer %d is none", which, layer);
    Norm& norm = which == JAXGPT_LN_F ? model->last_norm : model->layers[size_t(layer)].norms[which];
    set_norm(norm, gain, bias, model->shape.n_embd);
  });
}

int jaxgpt_model_set_linear(jaxgpt_model* model, int which, int layer, const jaxgpt_linear* linear) {
  static const char* const names[] = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"};
  static const int outputs[] = {3, 1, 4, 1}, inputs[] = {1, 1, 1, 4};
  return guarded([&] {
    need_open(model);
    need(linear);
    if (layer < 0 || layer >= model->shape.n_layer || which < 0 || which > JAXGPT_MLP_C_PROJ)
      refuse("matrix %d of layer %d is none", which, layer);
    const int C = model->shape.n_embd;
    const std::string name = "h." + std::to_string(layer) + "." + names[which];
    model->set_matrix(model->layers[size_t(layer)].matrices[which], *linear, outputs[which] * C, inputs[which] * C,
                      name.c_str());
  });
}

int jaxgpt_model_set_head(jaxgpt_model* model, const jaxgpt_linear* linear) {
  return guarded([&] {
    need_open(model);
    need(linear);
    if (linear->bias || linear->smooth) refuse("the head has a bias or a smoothing, expected none");
    model->set_matrix(model->head, *linear, model->shape.vocab_size, model->shape.n_embd, "lm_head", true);
  });
}

int jaxgpt_model_set_tokens(jaxgpt_model* model, const int8_t* rows, const float* scale, const float* smooth) {
  return guarded([&] {
    need_open(model);
    const size_t V = size_t(model->shape.vocab_size), C = size_t(model->shape.n_embd);
    if (!model->shape.tied) {
      if (!rows || !scale) refuse("the token embedding has no rows or no steps");
      model->token_rows.assign(rows, rows + V * C);
      model->token_scale.assign(scale, scale + V);
    }
    if (smooth) model->token_smooth.assign(smooth, smooth + C);
    model->tokens_set = true;
  });
}

int jaxgpt_model_set_positions(jaxgpt_model* model, const int8_t* rows, const float* scale) {
  return guarded([&] {
    need_open(model);
    if (model->shape.rotary || !rows || !scale) refuse("a position embedding is missing, or not for this model");
    const size_t S = size_t(model->shape.block_size);
    model->position_rows.assign(rows, rows + S * size_t(model->shape.n_embd));
    model->position_scale.assign(scale, scale + S);
  });
}

int jaxgpt_model_set_turns(jaxgpt_model* model, const float* turns) {
  return guarded([&] {
    need_open(model);
    if (!model->shape.rotary || !turns) refuse("rotary positions are missing, or not for this model");
    model->turns.assign(turns, turns + 2 * size_t(model->shape.block_size) * size_t(model->head_size()));
  });
}

int jaxgpt_model_ready(jaxgpt_model* model) {
  return guarded([&] {
    need(model);
    model->check_complete();
  });
}

const char* jaxgpt_model_isa(const jaxgpt_model* model) { return model->kernels->name; }
int64_t jaxgpt_model_bytes(const jaxgpt_model* model) { return model->bytes_read; }
void jaxgpt_model_use_screen(jaxgpt_model* model, int use) {
  std::lock_guard<std::mutex> lock(model->turn);
  model->use_screen = use != 0;
}
void jaxgpt_model_free(jaxgpt_model* model) { delete model; }

int jaxgpt_session_new(jaxgpt_model* model, int slots, int kv, jaxgpt_session** session) {
  return guarded([&] {
    need(model, session);
    if (!model->ready) refuse("the model is not ready: jaxgpt_model_ready comes before its sessions");
    if (slots < 1 || slots > 1 << 16) refuse("%d slots are none", slots);
    if (kv < JAXGPT_KV_FLOAT || kv > JAXGPT_KV_INT8) refuse("cache kind %d is none", kv);
    *session = new jaxgpt_session(*model, slots, kv);
  });
}

void jaxgpt_session_free(jaxgpt_session* session) { delete session; }

int jaxgpt_session_truncate(jaxgpt_session* session, int slot, int length) {
  return guarded([&] {
    need(session);
    std::lock_guard<std::mutex> lock(session->model.turn);
    if (slot < 0 || slot >= int(session->lengths.size()) || length < 0 || length > session->lengths[size_t(slot)])
      refuse("slot %d cannot be cut to %d tokens", slot, length);
    session->lengths[size_t(slot)] = length;
  });
}

int64_t jaxgpt_session_exact_outputs(const jaxgpt_session* session) {
  std::lock_guard<std::mutex> lock(session->model.turn);
  return 16 * session->columns_read;
}

int jaxgpt_session_length(const jaxgpt_session* session, int slot) {
  std::lock_guard<std::mutex> lock(session->model.turn);
  return slot >= 0 && slot < int(session->lengths.size()) ? session->lengths[size_t(slot)] : -1;
}

int jaxgpt_session_forward(jaxgpt_session* session, int rows, const int32_t* slots, const int32_t* tokens,
                           const uint8_t* wanted, float* logits, int32_t* best) {
  return guarded([&] {
    need(session, slots, tokens, wanted);
    if (rows < 1) refuse("no tokens were given");
    session->forward(rows, slots, tokens, wanted, logits, best);
  });
}

int jaxgpt_session_follow(jaxgpt_session* session, int32_t slot, int32_t token, int32_t most, int32_t end,
                          int32_t* tokens, int32_t* made) {
  return guarded([&] {
    need(session, tokens, made);
    if (most < 1) refuse("%d tokens are none", most);
    *made = 0;
    const int before = jaxgpt_session_length(session, slot);
    if (before >= 0 && most > session->model.shape.block_size - before)
      refuse("slot %d would have more tokens than the context of %d holds", slot, session->model.shape.block_size);
    const uint8_t wanted = 1;
    try {
      while (*made < most && (*made == 0 || token != end)) {
        session->forward(1, &slot, &token, &wanted, nullptr, &tokens[*made]);
        token = tokens[(*made)++];
      }
    } catch (...) {
      if (before >= 0) jaxgpt_session_truncate(session, slot, before);
      throw;
    }
  });
}

int jaxgpt_sums(const char* isa, const int8_t* weight, int outputs, int inputs, const int8_t* x, int rows,
                int32_t* sums) {
  return guarded([&] {
    constexpr int kMost = 1 << 17;  // whose sums 32 bits hold
    need(weight, x, sums);
    if (outputs < 1 || inputs < 1 || rows < 1 || outputs > kMost || inputs > kMost || rows > kMost)
      refuse("a product of %d rows, %d inputs, %d outputs is none", rows, inputs, outputs);
    const Kernels* k = chosen_kernels(isa);
    jaxgpt_model model(jaxgpt_shape{1, 1, inputs, 1, outputs, 1, 0}, k, 1);  // the matrix is its head
    Matrix matrix;
    const std::vector<float> ones(size_t(outputs), 1.0f);
    const jaxgpt_linear linear = {weight, ones.data(), nullptr, nullptr, outputs, inputs, 8, 0, 0, 1.0f};
    model.set_matrix(matrix, linear, outputs, inputs, "matrix");
    const int width = padded(inputs);
    std::vector<int8_t> wide(size_t(rows) * size_t(width), 0);
    std::vector<int32_t> start(size_t(rows), 0), tile(size_t(rows) * kTile);
    for (int r = 0; r < rows; r++)
      for (int i = 0; i < inputs; i++) {
        wide[size_t(r) * size_t(width) + size_t(i)] = x[size_t(r) * size_t(inputs) + size_t(i)];
        start[size_t(r)] -= 128 * x[size_t(r) * size_t(inputs) + size_t(i)];
      }
    const auto dot = k->many_from && rows >= k->many_from ? k->many : k->dot8;
    for (int t = 0; t < matrix.tiles(); t++) {
      dot(matrix.weights(t), width, wide.data(), width, rows, start.data(), tile.data());
      for (int r = 0; r < rows; r++)
        for (int o = 0; o < std::min(kTile, outputs - t * kTile); o++)
          sums[size_t(r) * size_t(outputs) + size_t(t * kTile + o)] = tile[size_t(r * kTile + o)];
    }
  });
}

int jaxgpt_read_seconds(int64_t bytes, int threads, int passes, double* seconds) {
  return guarded([&] {
    constexpr size_t kPiece = size_t(1) << 16;
    need(seconds);
    if (bytes < int64_t(kPiece) || bytes > int64_t(1) << 46)
      refuse("%lld bytes are too few or too many to read", static_cast<long long>(bytes));
    if (threads < 1 || threads > kMostThreads) refuse("%d threads are none", threads);
    const Kernels* k = chosen_kernels(nullptr);
    Pool pool(threads);
    const size_t pieces = size_t(bytes) / kPiece;
    const Pages buffer(pieces * kPiece + 4096, true);
    memset(buffer.as<uint8_t>(), 1, buffer.bytes());
    std::vector<uint64_t> seen(pieces);
    for (int pass = 0; pass < passes; pass++) {
      const auto started = std::chrono::steady_clock::now();
      pool.run(int(pieces), [&](int piece) {
        seen[size_t(piece)] = k->read(buffer.as<uint8_t>() + size_t(piece) * kPiece, kPiece);
      });
      seconds[pass] = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
      uint64_t all = 0;
      for (const uint64_t one : seen) all ^= one;
      volatile uint64_t kept = all;
      (void)kept;
    }
  });
}
