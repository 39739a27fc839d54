// The C interface: checks what it is given, turns exceptions into codes and messages.
#include "engine.h"

#include <mutex>
#include <string>

#include "logits/draw.h"
#include "logits/top.h"
#include "runtime/errors.h"
#include "session.h"

namespace {

// A model whose weights are still being set.
void require_open(const jaxgpt_model* model) {
  require_non_null(model);
  if (model->ready) throw_error(JAXGPT_BAD_STATE, "the model is ready: its weights are set already");
}

void check_shape(const jaxgpt_shape& s) {
  constexpr int kMaxPositions = 1 << 20;
  if (s.n_layer < 1 || s.n_layer > 4096 || s.n_head < 1 || s.n_embd < 1 || s.n_embd > 1 << 15 ||
      s.block_size < 1 || s.block_size > kMaxPositions || s.vocab_size < 1 || s.vocab_size > 1 << 24)
    throw_error(JAXGPT_BAD_ARGUMENT, "a model of %d layers, %d heads, %d channels, %d positions, %d tokens is none",
                s.n_layer, s.n_head, s.n_embd, s.block_size, s.vocab_size);
  if (s.n_embd % s.n_head || s.n_embd / s.n_head > kMaxHeadSize)
    throw_error(JAXGPT_BAD_ARGUMENT, "%d channels cannot be shared by %d heads of up to %d", s.n_embd, s.n_head,
                kMaxHeadSize);
  if (s.max_bits != 8 && s.max_bits != 16 && s.max_bits != 32)
    throw_error(JAXGPT_BAD_ARGUMENT, "weights of at most %d bits are none; expected 8, 16 or 32", s.max_bits);
  if (s.rotary && s.n_embd / s.n_head % 2)
    throw_error(JAXGPT_BAD_ARGUMENT, "rotary positions want an even head size");
}

void set_norm(Norm& norm, const float* gain, const float* bias, int n) {
  if (!gain || !bias) throw_error(JAXGPT_BAD_ARGUMENT, "a norm has no gain or no bias");
  norm.gain.assign(gain, gain + n);
  norm.bias.assign(bias, bias + n);
}

}  // namespace

const char* jaxgpt_error(void) { return error_message(); }
int jaxgpt_version(void) { return JAXGPT_ENGINE_VERSION; }
const char* jaxgpt_instruction_sets(void) { return kernel_names(); }

// ---- models

int jaxgpt_model_new(const jaxgpt_shape* shape, const char* isa, int threads, jaxgpt_model** model) {
  return guarded([&] {
    require_non_null(shape, model);
    check_shape(*shape);
    *model = new jaxgpt_model(*shape, require_kernels(isa), threads);
  });
}

int jaxgpt_model_set_norm(jaxgpt_model* model, int which, int layer, const float* gain, const float* bias) {
  return guarded([&] {
    require_open(model);
    if (which != JAXGPT_LN_F && (layer < 0 || layer >= model->shape.n_layer || which < 0 || which > JAXGPT_LN_2))
      throw_error(JAXGPT_BAD_ARGUMENT, "norm %d of layer %d is none", which, layer);
    Norm& norm = which == JAXGPT_LN_F ? model->last_norm : model->layers[size_t(layer)].norms[which];
    set_norm(norm, gain, bias, model->shape.n_embd);
  });
}

int jaxgpt_model_set_linear(jaxgpt_model* model, int which, int layer, const jaxgpt_linear* linear) {
  static const char* const names[] = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"};
  static const int outputs[] = {3, 1, 4, 1}, inputs[] = {1, 1, 1, 4};
  return guarded([&] {
    require_open(model);
    require_non_null(linear);
    if (layer < 0 || layer >= model->shape.n_layer || which < 0 || which > JAXGPT_MLP_C_PROJ)
      throw_error(JAXGPT_BAD_ARGUMENT, "matrix %d of layer %d is none", which, layer);
    const int C = model->shape.n_embd;
    const std::string name = "h." + std::to_string(layer) + "." + names[which];
    model->set_matrix(model->layers[size_t(layer)].matrices[which], *linear, outputs[which] * C, inputs[which] * C,
                      name.c_str());
  });
}

int jaxgpt_model_set_head(jaxgpt_model* model, const jaxgpt_linear* linear) {
  return guarded([&] {
    require_open(model);
    require_non_null(linear);
    if (linear->bias || linear->smooth)
      throw_error(JAXGPT_BAD_ARGUMENT, "the head has a bias or a smoothing, expected none");
    model->set_matrix(model->head, *linear, model->shape.vocab_size, model->shape.n_embd, "lm_head", true);
  });
}

int jaxgpt_model_set_tokens(jaxgpt_model* model, const void* rows, const float* scale, const float* smooth) {
  return guarded([&] {
    require_open(model);
    const size_t V = size_t(model->shape.vocab_size), C = size_t(model->shape.n_embd);
    if (!model->shape.tied) {
      if (!rows) throw_error(JAXGPT_BAD_ARGUMENT, "the token embedding has no rows");
      model->token_rows = EmbeddingRows(rows, scale, V, C);
    }
    if (smooth) model->token_smooth.assign(smooth, smooth + C);
    model->tokens_set = true;
  });
}

int jaxgpt_model_set_positions(jaxgpt_model* model, const void* rows, const float* scale) {
  return guarded([&] {
    require_open(model);
    if (model->shape.rotary || !rows)
      throw_error(JAXGPT_BAD_ARGUMENT, "a position embedding is missing, or not for this model");
    const jaxgpt_shape& shape = model->shape;
    model->position_rows = EmbeddingRows(rows, scale, size_t(shape.block_size), size_t(shape.n_embd));
  });
}

int jaxgpt_model_set_rope_table(jaxgpt_model* model, const float* table) {
  return guarded([&] {
    require_open(model);
    if (!model->shape.rotary || !table)
      throw_error(JAXGPT_BAD_ARGUMENT, "rotary positions are missing, or not for this model");
    model->rope_table.assign(table, table + 2 * size_t(model->shape.block_size) * size_t(model->head_size()));
  });
}

int jaxgpt_model_ready(jaxgpt_model* model) {
  return guarded([&] {
    require_non_null(model);
    model->check_complete();
  });
}

const char* jaxgpt_model_isa(const jaxgpt_model* model) { return model->kernels->name; }
int64_t jaxgpt_model_bytes(const jaxgpt_model* model) { return model->bytes_read; }
void jaxgpt_model_free(jaxgpt_model* model) { delete model; }

// ---- sessions

int jaxgpt_session_new(jaxgpt_model* model, int slots, int kv, jaxgpt_session** session) {
  return guarded([&] {
    require_non_null(model, session);
    if (!model->ready)
      throw_error(JAXGPT_BAD_STATE, "the model is not ready: jaxgpt_model_ready comes before its sessions");
    if (slots < 1 || slots > 1 << 16) throw_error(JAXGPT_BAD_ARGUMENT, "%d slots are none", slots);
    if (kv < JAXGPT_KV_FP32 || kv > JAXGPT_KV_INT8) throw_error(JAXGPT_BAD_ARGUMENT, "cache kind %d is none", kv);
    *session = new jaxgpt_session(*model, slots, kv);
  });
}

void jaxgpt_session_free(jaxgpt_session* session) { delete session; }

int jaxgpt_session_truncate(jaxgpt_session* session, int slot, int length) {
  return guarded([&] {
    require_non_null(session);
    std::lock_guard<std::mutex> lock(session->model.step_mutex);
    session->truncate(slot, length);
  });
}

int jaxgpt_session_copy(jaxgpt_session* session, int from, int to, int length) {
  return guarded([&] {
    require_non_null(session);
    std::lock_guard<std::mutex> lock(session->model.step_mutex);
    session->copy(from, to, length);
  });
}

int jaxgpt_session_release(jaxgpt_session* session, int slot) {
  return guarded([&] {
    require_non_null(session);
    std::lock_guard<std::mutex> lock(session->model.step_mutex);
    session->release(slot);
  });
}

int jaxgpt_session_touch(jaxgpt_session* session, int slot, int tokens) {
  return guarded([&] {
    require_non_null(session);
    std::lock_guard<std::mutex> lock(session->model.step_mutex);
    session->touch(slot, tokens);
  });
}

int64_t jaxgpt_session_bytes_per_token(const jaxgpt_session* session) { return int64_t(session->bytes_per_token()); }

int jaxgpt_session_length(const jaxgpt_session* session, int slot) { return session->length(slot); }

int jaxgpt_top(jaxgpt_model* model, int rows, int columns, const float* logits, const double* temperature, int k,
               int32_t* ids, double* scaled, double* total, uint8_t* finite) {
  return guarded([&] {
    require_non_null(model, logits, temperature, ids, scaled, total, finite);
    if (rows < 1 || columns < 1 || k < 1 || k > columns)
      throw_error(JAXGPT_BAD_ARGUMENT, "the %d largest of %d rows of %d are none", k, rows, columns);
    for (int row = 0; row < rows; row++)
      if (!(temperature[row] > 0)) throw_error(JAXGPT_BAD_ARGUMENT, "temperature %g is not positive", temperature[row]);
    std::lock_guard<std::mutex> lock(model->step_mutex);
    top_of_rows(*model, rows, columns, logits, temperature, k, {ids, scaled, total, finite});
  });
}

int jaxgpt_draw(jaxgpt_model* model, int rows, int columns, const float* logits, const jaxgpt_sampling* sampling,
                int32_t* tokens) {
  return guarded([&] {
    require_non_null(model, logits, sampling, tokens);
    if (rows < 1 || columns < 1) throw_error(JAXGPT_BAD_ARGUMENT, "%d rows of %d logits are none", rows, columns);
    for (const jaxgpt_sampling* s = sampling; s < sampling + rows; s++)
      if (!(s->temperature >= 0 && s->top_p > 0 && s->min_p >= 0 && s->min_p <= 1 && s->top_k >= 0 && s->uniform >= 0 &&
            s->uniform < 1))
        throw_error(JAXGPT_BAD_ARGUMENT, "temperature %g, top_p %g, min_p %g, top_k %d, uniform %g draw no token",
                    s->temperature, s->top_p, s->min_p, s->top_k, s->uniform);
    std::lock_guard<std::mutex> lock(model->step_mutex);
    draw_rows(*model, rows, columns, logits, sampling, tokens);
  });
}

int jaxgpt_session_use_screen(jaxgpt_session* session, int use) {
  return guarded([&] {
    require_non_null(session);
    std::lock_guard<std::mutex> lock(session->model.step_mutex);
    session->head.use_screen(use != 0);
  });
}

int64_t jaxgpt_session_exact_outputs(const jaxgpt_session* session) {
  std::lock_guard<std::mutex> lock(session->model.step_mutex);
  return session->head.exact_outputs();
}

int jaxgpt_session_forward(jaxgpt_session* session, int rows, const int32_t* slots, const int32_t* tokens,
                           const uint8_t* wanted, float* logits, int32_t* best) {
  return guarded([&] {
    require_non_null(session, slots, tokens, wanted);
    if (rows < 1) throw_error(JAXGPT_BAD_ARGUMENT, "no tokens were given");
    session->forward(rows, slots, tokens, wanted, logits, best);
  });
}

int jaxgpt_session_decode_greedy(jaxgpt_session* session, int32_t slot, int32_t token, int32_t max_tokens,
                                 int32_t stop_token, int32_t* tokens, int32_t* count) {
  return guarded([&] {
    require_non_null(session, tokens, count);
    *count = 0;
    if (max_tokens < 1) throw_error(JAXGPT_BAD_ARGUMENT, "%d tokens are none", max_tokens);
    *count = session->decode_greedy(slot, token, max_tokens, stop_token, tokens);
  });
}
