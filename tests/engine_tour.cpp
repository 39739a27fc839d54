// A tour of the native engine for the sanitizers: every kind of layer, cache and instruction set, and wrong numbers.
//
//   engine_tour all      one thread after the other
//   engine_tour threads  sessions of one model, and one session, used from several threads at once
//
// tests/test_export_sanitizers.py builds and runs it. Weights are random; what is compared is what must agree
// whatever they are: a text taken at once and token by token, alone and in a batch, with the screen and without.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "engine.h"

namespace {

#define EXPECT(condition)                                                                        \
  do {                                                                                           \
    if (!(condition)) {                                                                          \
      fprintf(stderr, "%s:%d: %s (%s)\n", __FILE__, __LINE__, #condition, jaxgpt_error());       \
      exit(3);                                                                                   \
    }                                                                                            \
  } while (0)

constexpr float kScale = 0.02f;

struct Kind {
  const char* name;
  int bits;
  bool two_level, smooth, fixed;  // fixed: inputs have stored scales
};
constexpr Kind kKinds[] = {
    {"dynamic, two-level and smooth", 8, true, true, false},
    {"dynamic", 8, false, false, false},
    {"static", 8, false, true, true},
    {"weight-only int8", 8, true, false, false},
    {"weight-only int4", 4, true, false, false},
    {"float16", 16, false, false, false},
    {"float32", 32, false, false, false},
};

// Weights as a caller has them, freed right after they are packed: the engine keeps no pointer.
struct Weights {
  std::mt19937 draw{7};

  std::vector<int8_t> bytes(size_t n) {
    std::vector<int8_t> made(n);
    for (auto& b : made) b = int8_t(int(draw() % 255) - 127);
    return made;
  }
  std::vector<float> floats(size_t n, float low, float high) {
    std::vector<float> made(n);
    for (auto& x : made) x = low + (high - low) * float(draw() % 10007) / 10006.0f;
    return made;
  }
};

template <typename Set>
void with_linear(Weights& weights, const Kind& kind, int outputs, int inputs, int group, bool head, const Set& set) {
  const size_t O = size_t(outputs), I = size_t(inputs);
  const auto bias = weights.floats(O, -0.1f, 0.1f), smooth = weights.floats(I, 0.5f, 2.0f);
  const auto q = weights.bytes(kind.bits == 4 && !head ? O * I / 2 : O * I);
  const auto float32 = weights.floats(kind.bits == 32 ? O * I : 0, -kScale, kScale);
  std::vector<uint16_t> float16(kind.bits == 16 ? O * I : 0);
  for (auto& half : float16) half = uint16_t((weights.draw() % 2 ? 0xa000 : 0x2000) + weights.draw() % 512);  // about 0.01
  const auto scale = weights.floats(O, kScale / 127 / 2, kScale / 127);
  std::vector<uint16_t> scales4(group ? O * (I / size_t(group)) : 0);
  for (auto& s : scales4) s = uint16_t((weights.draw() % 2 ? 0xbb00 : 0x3b00) + weights.draw() % 64);  // about 0.002
  jaxgpt_linear linear = {};
  linear.weight = q.data();
  linear.weight_scale = scale.data();
  linear.bias = head ? nullptr : bias.data();
  linear.outputs = outputs;
  linear.inputs = inputs;
  linear.bits = head && kind.bits == 4 ? 8 : kind.bits;
  linear.two_level = kind.two_level;
  if (linear.bits == 4) {
    linear.weight_scale = scales4.data();
    linear.group_size = group;
  }
  if (linear.bits >= 16) {
    linear.weight = linear.bits == 16 ? static_cast<const void*>(float16.data()) : float32.data();
    linear.weight_scale = nullptr;
  }
  if (kind.smooth && !head) linear.smooth = smooth.data();
  if (kind.fixed) linear.input_scale = 0.05f;
  set(linear);
}

jaxgpt_model* make_model(const Kind& kind, jaxgpt_shape shape, const char* isa, int threads, int group) {
  Weights weights;
  jaxgpt_model* model = nullptr;
  shape.max_bits = std::max(8, kind.bits);
  EXPECT(jaxgpt_model_new(&shape, isa, threads, &model) == 0);
  const int C = shape.n_embd, V = shape.vocab_size;
  const auto gain = weights.floats(size_t(C), 0.5f, 1.5f), bias = weights.floats(size_t(C), -0.1f, 0.1f);
  const int outputs[] = {3 * C, C, 4 * C, C}, inputs[] = {C, C, C, 4 * C};
  for (int layer = 0; layer < shape.n_layer; layer++) {
    for (int which = 0; which < 2; which++)
      EXPECT(jaxgpt_model_set_norm(model, which, layer, gain.data(), bias.data()) == 0);
    for (int which = 0; which < 4; which++)
      with_linear(weights, kind, outputs[which], inputs[which], kind.bits == 4 ? group : 0, false,
                  [&](const jaxgpt_linear& linear) {
                    EXPECT(jaxgpt_model_set_linear(model, which, layer, &linear) == 0);
                  });
  }
  EXPECT(jaxgpt_model_set_norm(model, JAXGPT_LN_F, 0, gain.data(), bias.data()) == 0);
  EXPECT(jaxgpt_model_ready(model) == JAXGPT_BAD_STATE);
  jaxgpt_session* early = nullptr;
  EXPECT(jaxgpt_session_new(model, 1, JAXGPT_KV_FP16, &early) == JAXGPT_BAD_STATE);  // not before the model is whole
  with_linear(weights, kind, V, C, 0, true,
              [&](const jaxgpt_linear& linear) { EXPECT(jaxgpt_model_set_head(model, &linear) == 0); });
  const auto rows = weights.bytes(size_t(V) * size_t(C));
  const auto float_rows = weights.floats(size_t(V) * size_t(C), -1, 1);
  const auto row_scale = weights.floats(size_t(V), kScale / 2, kScale);
  const auto smooth = weights.floats(size_t(C), 0.5f, 2.0f);
  const bool with_floats = kind.bits >= 16;
  const void* own = with_floats ? static_cast<const void*>(float_rows.data()) : rows.data();
  EXPECT(jaxgpt_model_set_tokens(model, shape.tied ? nullptr : own,
                                 shape.tied || with_floats ? nullptr : row_scale.data(),
                                 shape.tied && kind.smooth ? smooth.data() : nullptr) == 0);
  if (shape.rotary) {
    const size_t D = size_t(C / shape.n_head), S = size_t(shape.block_size);
    std::vector<float> table(2 * S * D);
    for (size_t t = 0; t < S; t++)
      for (size_t i = 0; i < D; i++) {
        table[t * D + i] = std::cos(float(t) / float(i % (D / 2) + 1));
        table[S * D + t * D + i] = std::sin(float(t) / float(i % (D / 2) + 1));
      }
    EXPECT(jaxgpt_model_set_rope_table(model, table.data()) == 0);
  } else {
    const auto places = weights.bytes(size_t(shape.block_size) * size_t(C));
    const auto place_scale = weights.floats(size_t(shape.block_size), kScale / 2, kScale);
    const auto float_places = weights.floats(places.size(), -1, 1);
    EXPECT(jaxgpt_model_set_positions(model, with_floats ? static_cast<const void*>(float_places.data()) : places.data(),
                                      with_floats ? nullptr : place_scale.data()) == 0);
  }
  EXPECT(jaxgpt_model_ready(model) == 0);
  EXPECT(jaxgpt_model_bytes(model) > 0);
  return model;
}

std::vector<int32_t> text(int n, int vocab_size, unsigned seed = 1) {
  std::mt19937 draw(seed);
  std::vector<int32_t> tokens(size_t(n), 0);
  for (auto& token : tokens) token = int32_t(draw() % unsigned(vocab_size));
  return tokens;
}

// Arrays exactly as long as the contract says, on the heap, so that an access beyond is seen.
int take(jaxgpt_session* session, const std::vector<int32_t>& tokens, const std::vector<int32_t>& slots,
         const std::vector<uint8_t>& wanted, std::vector<float>* logits, std::vector<int32_t>* best) {
  return jaxgpt_session_forward(session, int(tokens.size()), slots.data(), tokens.data(), wanted.data(),
                                logits ? logits->data() : nullptr, best ? best->data() : nullptr);
}

int take_last(jaxgpt_session* session, const std::vector<int32_t>& tokens, int slot, int32_t* best) {
  std::vector<uint8_t> wanted(tokens.size(), 0);
  wanted.back() = 1;
  std::vector<int32_t> found(1);
  const int rc = take(session, tokens, std::vector<int32_t>(tokens.size(), slot), wanted, nullptr, &found);
  *best = found[0];
  return rc;
}

bool all_finite(const std::vector<float>& x) {
  for (const float v : x)
    if (!std::isfinite(v)) return false;
  return true;
}

// A slot that is copied, cut and released goes on as one that took the same tokens; `batch` has five slots.
void check_slots(jaxgpt_session* batch, const jaxgpt_shape& shape) {
  const int n = std::min(70, shape.block_size - 1);
  const auto tokens = text(n, shape.vocab_size);
  int32_t expected = -1, found = -1;
  EXPECT(jaxgpt_session_bytes_per_token(batch) > 0);
  for (const int slot : {0, 2}) EXPECT(jaxgpt_session_truncate(batch, slot, 0) == 0);
  EXPECT(take_last(batch, tokens, 0, &expected) == 0);
  EXPECT(take_last(batch, {0}, 0, &expected) == 0);
  EXPECT(take_last(batch, text(n, shape.vocab_size, 2), 2, &found) == 0);
  EXPECT(jaxgpt_session_copy(batch, 0, 2, n) == 0 && jaxgpt_session_length(batch, 2) == n);
  EXPECT(take_last(batch, {0}, 2, &found) == 0 && found == expected);
  EXPECT(jaxgpt_session_release(batch, 2) == 0 && jaxgpt_session_length(batch, 2) == 0);
  EXPECT(jaxgpt_session_copy(batch, 0, 0, n) == 0 && jaxgpt_session_copy(batch, 0, 2, n) == 0);
  EXPECT(take_last(batch, {0}, 2, &found) == 0 && found == expected);
  EXPECT(jaxgpt_session_touch(batch, 3, shape.block_size) == 0 && jaxgpt_session_touch(batch, 0, 1) == 0);
  EXPECT(jaxgpt_session_touch(batch, 0, shape.block_size + 1) == JAXGPT_BAD_ARGUMENT);
  EXPECT(jaxgpt_session_copy(batch, 0, 2, n + 1) == JAXGPT_BAD_ARGUMENT);
}

// Rows reduced, with arrays exactly as long as the contract says: the first of the largest is each row's choice.
void check_top(jaxgpt_model* model, int columns, const std::vector<float>& logits, const std::vector<int32_t>& choices) {
  const size_t rows = choices.size();
  for (const int k : {1, std::min(columns, 64), columns}) {
    std::vector<int32_t> ids(rows * size_t(k));
    std::vector<double> scaled(rows * size_t(k)), total(rows), temperature(rows, 0.7);
    std::vector<uint8_t> finite(rows, 0);
    EXPECT(jaxgpt_top(model, int(rows), columns, logits.data(), temperature.data(), k, ids.data(), scaled.data(),
                      total.data(), finite.data()) == 0);
    for (size_t row = 0; row < rows; row++) {
      EXPECT(finite[row] && ids[row * size_t(k)] == choices[row] && scaled[row * size_t(k)] == 0);
      EXPECT(total[row] >= 1 && total[row] <= columns);
    }
  }
}

// Tokens drawn: near 0 the most probable one, whatever is cut off; near 1 one of those that are kept.
void check_draw(jaxgpt_model* model, int columns, const std::vector<float>& logits, const std::vector<int32_t>& choices) {
  const size_t rows = choices.size();
  std::vector<int32_t> tokens(rows, -2);
  for (const jaxgpt_sampling& each : {jaxgpt_sampling{0, 1, 0, 0.9, 0}, jaxgpt_sampling{0.7, 1, 0, 0, 0},
                                      jaxgpt_sampling{0.7, 1, 0, 0.999, 1}, jaxgpt_sampling{2, 1e-9, 0, 0.999, 0},
                                      jaxgpt_sampling{2, 1, 1, 0, 0}, jaxgpt_sampling{2, 0.9, 0.01, 0, columns}}) {
    EXPECT(jaxgpt_draw(model, int(rows), columns, logits.data(), std::vector<jaxgpt_sampling>(rows, each).data(),
                       tokens.data()) == 0);
    EXPECT(tokens == choices);
  }
  const std::vector<jaxgpt_sampling> any(rows, {1, 0.99, 0, 0.999, 0});
  EXPECT(jaxgpt_draw(model, int(rows), columns, logits.data(), any.data(), tokens.data()) == 0);
  for (const int32_t token : tokens) EXPECT(token >= 0 && token < columns);
}

void tour(const Kind& kind, const jaxgpt_shape& shape, const char* isa, int kv, int threads, int group) {
  jaxgpt_model* model = make_model(kind, shape, isa, threads, group);
  const int V = shape.vocab_size, S = shape.block_size;
  jaxgpt_session *session = nullptr, *batch = nullptr;
  EXPECT(jaxgpt_session_new(model, 1, kv, &session) == 0);
  EXPECT(jaxgpt_session_new(model, 5, kv, &batch) == 0);
  int32_t best = -1;
  for (const int n : {1, 2, 17, 33, 255, 256, 257, S - 1, S}) {
    if (n > S) continue;
    EXPECT(jaxgpt_session_truncate(session, 0, 0) == 0);
    EXPECT(take_last(session, text(n, V), 0, &best) == 0);
    EXPECT(best >= 0 && best < V && jaxgpt_session_length(session, 0) == n);
  }
  EXPECT(take_last(session, {0}, 0, &best) == JAXGPT_BAD_STATE);  // the context is full
  EXPECT(jaxgpt_session_length(session, 0) == S);
  EXPECT(jaxgpt_session_truncate(session, 0, S + 1) == JAXGPT_BAD_ARGUMENT);
  for (const int length : {S - 1, S / 2, 1, 0}) {  // forget, and go on
    EXPECT(jaxgpt_session_truncate(session, 0, length) == 0);
    for (int i = 0; i < 3 && length + i < S; i++) EXPECT(take_last(session, {int32_t(i % V)}, 0, &best) == 0);
    EXPECT(jaxgpt_session_truncate(session, 0, length) == 0);
  }
  // Every row's logits and choice, several rows of several slots, in an order of their own.
  std::vector<int32_t> slots, tokens;
  std::vector<uint8_t> wanted;
  for (const int slot : {3, 0, 4, 1})
    for (int i = 0; i < (slot == 4 ? 40 : slot + 1) && i < S; i++) {
      slots.push_back(slot);
      tokens.push_back((7 * i + slot) % V);
      wanted.push_back(i % 3 != 1);
    }
  size_t count = 0;
  for (const uint8_t w : wanted) count += w;
  std::vector<float> logits(count * size_t(V));
  std::vector<int32_t> choices(count);
  EXPECT(take(batch, tokens, slots, wanted, &logits, &choices) == 0);
  EXPECT(all_finite(logits));
  for (size_t row = 0; row < count; row++) {
    const float* own = &logits[row * size_t(V)];
    size_t top = 0;
    for (size_t v = 1; v < size_t(V); v++)
      if (own[v] > own[top]) top = v;
    EXPECT(size_t(choices[row]) == top);
  }
  check_top(model, V, logits, choices);
  check_draw(model, V, logits, choices);
  // Token by token, with the screen and without: the same choices.
  std::vector<int32_t> chosen[2];
  for (const int screened : {0, 1}) {
    EXPECT(jaxgpt_session_use_screen(session, screened) == 0);
    EXPECT(jaxgpt_session_truncate(session, 0, 0) == 0);
    best = 0;
    for (int i = 0; i < 12 && i < S; i++) {
      EXPECT(take_last(session, {best}, 0, &best) == 0);
      chosen[screened].push_back(best);
    }
  }
  EXPECT(chosen[0] == chosen[1]);
  // In one call, and up to a token that ends it.
  std::vector<int32_t> decoded(chosen[0].size());
  int32_t made = 0;
  EXPECT(jaxgpt_session_truncate(session, 0, 0) == 0);
  EXPECT(jaxgpt_session_decode_greedy(session, 0, 0, int32_t(decoded.size()), -1, decoded.data(), &made) == 0);
  EXPECT(size_t(made) == decoded.size() && decoded == chosen[0]);
  EXPECT(jaxgpt_session_truncate(session, 0, 0) == 0);
  EXPECT(jaxgpt_session_decode_greedy(session, 0, 0, int32_t(decoded.size()), chosen[0][0], decoded.data(), &made) == 0);
  EXPECT(made == 1 && jaxgpt_session_length(session, 0) == 1);
  EXPECT(jaxgpt_session_exact_outputs(session) >= 0);
  jaxgpt_session_free(session);
  EXPECT(jaxgpt_session_length(batch, 4) == std::min(40, S));
  check_slots(batch, shape);
  jaxgpt_session_free(batch);
  jaxgpt_model_free(model);
}

// Wrong numbers at every door: -1 and a text, nothing else.
void refusals() {
  const int kInts[] = {-1, std::numeric_limits<int>::min(), std::numeric_limits<int>::max(), 1 << 30, -65536};
  const Kind& kind = kKinds[0];
  const jaxgpt_shape shape = {1, 2, 24, 40, 300, 1, 0, 8};
  jaxgpt_model* model = nullptr;
  EXPECT(jaxgpt_model_new(nullptr, nullptr, 1, &model) == JAXGPT_BAD_ARGUMENT);
  EXPECT(jaxgpt_model_new(&shape, nullptr, 1, nullptr) == JAXGPT_BAD_ARGUMENT);
  EXPECT(jaxgpt_model_new(&shape, "no such set", 1, &model) == JAXGPT_BAD_ARGUMENT);
  for (const int wrong : kInts) {
    EXPECT(jaxgpt_model_new(&shape, nullptr, wrong, &model) == JAXGPT_BAD_ARGUMENT);
    for (int field = 0; field < 5; field++) {
      jaxgpt_shape other = shape;
      (&other.n_layer)[field] = wrong;
      EXPECT(jaxgpt_model_new(&other, nullptr, 1, &model) == JAXGPT_BAD_ARGUMENT);
    }
  }
  jaxgpt_shape odd_bits = shape;
  odd_bits.max_bits = 4;
  EXPECT(jaxgpt_model_new(&odd_bits, nullptr, 1, &model) == JAXGPT_BAD_ARGUMENT);
  const jaxgpt_shape largest = {4096, 64, 1 << 15, 1 << 20, 1 << 24, 0, 0, 32};
  if (jaxgpt_model_new(&largest, nullptr, 1, &model) == 0) jaxgpt_model_free(model);  // where memory is promised freely
  model = nullptr;
  EXPECT(jaxgpt_model_new(&shape, nullptr, 1, &model) == 0);
  const std::vector<float> floats(24 * 4, 1.0f);
  for (const int wrong : kInts) {
    EXPECT(jaxgpt_model_set_norm(model, 0, wrong, floats.data(), floats.data()) == JAXGPT_BAD_ARGUMENT);
    EXPECT(jaxgpt_model_set_norm(model, wrong, 0, floats.data(), floats.data()) == JAXGPT_BAD_ARGUMENT);
  }
  EXPECT(jaxgpt_model_set_norm(model, 0, 0, nullptr, floats.data()) == JAXGPT_BAD_ARGUMENT);
  EXPECT(jaxgpt_model_set_norm(model, 0, 0, floats.data(), nullptr) == JAXGPT_BAD_ARGUMENT);
  EXPECT(jaxgpt_model_set_norm(model, 0, 1, floats.data(), floats.data()) == JAXGPT_BAD_ARGUMENT);
  EXPECT(jaxgpt_model_set_positions(model, nullptr, nullptr) == JAXGPT_BAD_ARGUMENT);
  EXPECT(jaxgpt_model_set_rope_table(model, floats.data()) == JAXGPT_BAD_ARGUMENT);
  EXPECT(jaxgpt_model_set_linear(model, 0, 0, nullptr) == JAXGPT_BAD_ARGUMENT);
  EXPECT(jaxgpt_model_set_head(model, nullptr) == JAXGPT_BAD_ARGUMENT);
  Weights weights;
  with_linear(weights, kind, 72, 24, 0, false, [&](const jaxgpt_linear& linear) {
    for (const int wrong : kInts) {
      EXPECT(jaxgpt_model_set_linear(model, wrong, 0, &linear) == JAXGPT_BAD_ARGUMENT);
      EXPECT(jaxgpt_model_set_linear(model, 0, wrong, &linear) == JAXGPT_BAD_ARGUMENT);
      for (int field = 0; field < 3; field++) {
        jaxgpt_linear other = linear;
        (&other.outputs)[field] = wrong;
        EXPECT(jaxgpt_model_set_linear(model, 0, 0, &other) == JAXGPT_BAD_ARGUMENT);
        EXPECT(jaxgpt_model_set_head(model, &other) == JAXGPT_BAD_ARGUMENT);
      }
      jaxgpt_linear four = linear;
      four.bits = 4, four.group_size = wrong, four.smooth = nullptr;
      EXPECT(jaxgpt_model_set_linear(model, 0, 0, &four) == JAXGPT_BAD_ARGUMENT);
    }
    for (const int group : {0, 4, 7, 16, 2056}) {
      jaxgpt_linear four = linear;
      four.bits = 4, four.group_size = group, four.smooth = nullptr;
      EXPECT(jaxgpt_model_set_linear(model, 0, 0, &four) == JAXGPT_BAD_ARGUMENT);
    }
    for (const float wrong : {-1.0f, NAN, INFINITY, 1e31f}) {
      jaxgpt_linear other = linear;
      other.input_scale = wrong;
      EXPECT(jaxgpt_model_set_linear(model, 0, 0, &other) == JAXGPT_BAD_ARGUMENT);
    }
    jaxgpt_linear other = linear;
    other.weight = nullptr;
    EXPECT(jaxgpt_model_set_linear(model, 0, 0, &other) == JAXGPT_BAD_ARGUMENT);
    other = linear;
    other.weight_scale = nullptr;
    EXPECT(jaxgpt_model_set_linear(model, 0, 0, &other) == JAXGPT_BAD_ARGUMENT);
    other = linear;  // floats: more bits than the shape has, an input that is rounded or smoothed
    other.bits = 32;
    EXPECT(jaxgpt_model_set_linear(model, 0, 0, &other) == JAXGPT_BAD_ARGUMENT);
    other.smooth = nullptr, other.two_level = 0;
    EXPECT(jaxgpt_model_set_linear(model, 0, 0, &other) == JAXGPT_BAD_ARGUMENT);
    EXPECT(jaxgpt_model_ready(model) == JAXGPT_BAD_STATE);
  });
  jaxgpt_model_free(model);

  model = make_model(kind, shape, nullptr, 2, 0);
  // A matrix that is set again is refused, and what was there stays.
  with_linear(weights, kind, 72, 24, 0, false, [&](const jaxgpt_linear& linear) {
    jaxgpt_linear other = linear;
    other.bias = nullptr;
    for (int i = 0; i < 20; i++) EXPECT(jaxgpt_model_set_linear(model, 0, 0, &other) == JAXGPT_BAD_STATE);
  });
  jaxgpt_session* session = nullptr;
  EXPECT(jaxgpt_session_new(nullptr, 1, JAXGPT_KV_FP16, &session) == JAXGPT_BAD_ARGUMENT);
  EXPECT(jaxgpt_session_new(model, 1, JAXGPT_KV_FP16, nullptr) == JAXGPT_BAD_ARGUMENT);
  EXPECT(jaxgpt_session_new(model, 0, JAXGPT_KV_FP16, &session) == JAXGPT_BAD_ARGUMENT);
  EXPECT(jaxgpt_session_new(model, 1, 3, &session) == JAXGPT_BAD_ARGUMENT);
  for (const int wrong : kInts) {
    EXPECT(jaxgpt_session_new(model, wrong, JAXGPT_KV_FP16, &session) == JAXGPT_BAD_ARGUMENT);
    EXPECT(jaxgpt_session_new(model, 1, wrong, &session) == JAXGPT_BAD_ARGUMENT);
  }
  EXPECT(jaxgpt_session_new(model, 2, JAXGPT_KV_FP16, &session) == 0);
  std::vector<float> logits(3 * 300);
  int32_t best = 0, made = 0;
  for (const int wrong : kInts) {
    EXPECT(take(session, {wrong}, {0}, {1}, &logits, nullptr) == JAXGPT_BAD_ARGUMENT);
    EXPECT(take(session, {1, wrong}, {0, 0}, {1, 1}, &logits, nullptr) == JAXGPT_BAD_ARGUMENT);
    EXPECT(take(session, {1}, {wrong}, {1}, &logits, nullptr) == JAXGPT_BAD_ARGUMENT);
    EXPECT(jaxgpt_session_truncate(session, wrong, 0) == JAXGPT_BAD_ARGUMENT);
    EXPECT(jaxgpt_session_truncate(session, 0, wrong) == JAXGPT_BAD_ARGUMENT);
    EXPECT(jaxgpt_session_length(session, wrong) == -1);
    EXPECT(jaxgpt_session_copy(session, wrong, 0, 0) == JAXGPT_BAD_ARGUMENT);
    EXPECT(jaxgpt_session_copy(session, 0, wrong, 0) == JAXGPT_BAD_ARGUMENT);
    EXPECT(jaxgpt_session_copy(session, 0, 1, wrong) == JAXGPT_BAD_ARGUMENT);
    EXPECT(jaxgpt_session_release(session, wrong) == JAXGPT_BAD_ARGUMENT);
    int32_t id = 0;
    double scaled = 0, total = 0;
    uint8_t finite = 0;
    const double temperature[] = {1.0, -double(wrong), double(wrong)};
    const auto top = [&](int rows, int columns, const double* divisor, int k) {
      return jaxgpt_top(model, rows, columns, logits.data(), divisor, k, &id, &scaled, &total, &finite);
    };
    const auto draw = [&](int rows, int columns, const jaxgpt_sampling& sampling) {
      return jaxgpt_draw(model, rows, columns, logits.data(), &sampling, &id);
    };
    if (wrong < 1) EXPECT(draw(wrong, 1, {1, 1, 0, 0, 0}) == JAXGPT_BAD_ARGUMENT);
    if (wrong < 1) EXPECT(draw(1, wrong, {1, 1, 0, 0, 0}) == JAXGPT_BAD_ARGUMENT);
    EXPECT(draw(1, 3, {-1, 1, 0, 0, 0}) == JAXGPT_BAD_ARGUMENT && draw(1, 3, {1, 0, 0, 0, 0}) == JAXGPT_BAD_ARGUMENT);
    EXPECT(draw(1, 3, {1, 1, 2, 0, 0}) == JAXGPT_BAD_ARGUMENT && draw(1, 3, {1, 1, 0, 1, 0}) == JAXGPT_BAD_ARGUMENT);
    EXPECT(draw(1, 3, {1, 1, 0, 0, -1}) == JAXGPT_BAD_ARGUMENT);
    if (wrong < 1) EXPECT(top(wrong, 1, temperature, 1) == JAXGPT_BAD_ARGUMENT);
    if (wrong < 1) EXPECT(top(1, wrong, temperature, 1) == JAXGPT_BAD_ARGUMENT);
    EXPECT(top(1, 3, temperature, wrong) == JAXGPT_BAD_ARGUMENT);
    EXPECT(top(1, 3, &temperature[wrong < 0 ? 2 : 1], 1) == JAXGPT_BAD_ARGUMENT);
    EXPECT(top(1, 3, nullptr, 1) == JAXGPT_BAD_ARGUMENT);
    EXPECT(jaxgpt_session_decode_greedy(session, wrong, 1, 1, -1, &best, &made) == JAXGPT_BAD_ARGUMENT);
    EXPECT(jaxgpt_session_decode_greedy(session, 0, wrong, 1, -1, &best, &made) == JAXGPT_BAD_ARGUMENT);
    if (wrong < 1) EXPECT(jaxgpt_session_decode_greedy(session, 0, 1, wrong, -1, &best, &made) == JAXGPT_BAD_ARGUMENT);
    const int32_t one = 0;
    const uint8_t yes = 1;
    if (wrong < 1) EXPECT(jaxgpt_session_forward(session, wrong, &one, &one, &yes, nullptr, &best) == JAXGPT_BAD_ARGUMENT);
  }
  EXPECT(take(session, {300}, {0}, {1}, &logits, nullptr) == JAXGPT_BAD_ARGUMENT);
  EXPECT(take(session, {1, 1, 1}, {0, 1, 0}, {1, 1, 1}, &logits, nullptr) == JAXGPT_BAD_ARGUMENT);
  EXPECT(take_last(session, text(41, 300), 1, &best) == JAXGPT_BAD_STATE);
  const int32_t one = 0;
  const uint8_t yes = 1;
  EXPECT(jaxgpt_session_forward(session, 1, nullptr, &one, &yes, nullptr, &best) == JAXGPT_BAD_ARGUMENT);
  EXPECT(jaxgpt_session_forward(session, 1, &one, nullptr, &yes, nullptr, &best) == JAXGPT_BAD_ARGUMENT);
  EXPECT(jaxgpt_session_forward(session, 1, &one, &one, nullptr, nullptr, &best) == JAXGPT_BAD_ARGUMENT);
  EXPECT(jaxgpt_session_decode_greedy(session, 0, 1, 1, -1, nullptr, &made) == JAXGPT_BAD_ARGUMENT);
  EXPECT(jaxgpt_session_decode_greedy(session, 0, 1, 1, -1, &best, nullptr) == JAXGPT_BAD_ARGUMENT);
  EXPECT(jaxgpt_session_length(session, 0) == 0 && jaxgpt_session_length(session, 1) == 0);
  EXPECT(take(session, {5, 6}, {0, 1}, {0, 0}, nullptr, nullptr) == 0);  // nothing is wanted: allowed
  EXPECT(take(session, {5, 6}, {0, 1}, {1, 1}, nullptr, nullptr) == 0);
  EXPECT(take_last(session, {1}, 0, &best) == 0);
  jaxgpt_session_free(session);
  jaxgpt_session_free(nullptr);
  jaxgpt_model_free(model);
  jaxgpt_model_free(nullptr);

  std::vector<int32_t> sums(64);
  const std::vector<int8_t> ones(64, 1);
  for (const int wrong : kInts) {
    EXPECT(jaxgpt_sums(nullptr, ones.data(), wrong, 1, ones.data(), 1, sums.data()) == JAXGPT_BAD_ARGUMENT);
    EXPECT(jaxgpt_sums(nullptr, ones.data(), 1, wrong, ones.data(), 1, sums.data()) == JAXGPT_BAD_ARGUMENT);
    EXPECT(jaxgpt_sums(nullptr, ones.data(), 1, 1, ones.data(), wrong, sums.data()) == JAXGPT_BAD_ARGUMENT);
    double seconds = 0;
    EXPECT(jaxgpt_read_seconds(1 << 20, wrong, 1, &seconds) == JAXGPT_BAD_ARGUMENT);
    EXPECT(jaxgpt_read_seconds(wrong < 0 ? wrong : std::numeric_limits<int64_t>::max(), 1, 1, &seconds) == JAXGPT_BAD_ARGUMENT);
  }
  double seconds[3];
  EXPECT(jaxgpt_read_seconds(1 << 20, 2, 3, seconds) == 0);
  EXPECT(jaxgpt_read_seconds(1 << 20, 2, 3, nullptr) == JAXGPT_BAD_ARGUMENT);
}

// Sums that overflow: an error for the caller, whichever thread meets them.
void overflows(const char* isa) {
  const jaxgpt_shape shape = {1, 2, 32, 16, 4099, 0, 0, 8};
  const auto head = [&](float first, float others) {
    std::vector<float> step(4099, others);
    step[0] = first;
    return step;
  };
  struct Case {
    float first, others;
  };
  for (const Case each : {Case{3e38f, 3e38f}, Case{3e38f, 1e-3f}, Case{3e34f, 3e38f}, Case{2e35f, 2e35f},
                          Case{1e36f, 1e37f}, Case{4e35f, 3e36f}}) {
    jaxgpt_model* model = nullptr;
    Weights weights;
    const Kind& kind = kKinds[1];
    EXPECT(jaxgpt_model_new(&shape, isa, 4, &model) == 0);
    const std::vector<float> ones(32, 1.0f);
    for (int which = 0; which < 2; which++)
      EXPECT(jaxgpt_model_set_norm(model, which, 0, ones.data(), ones.data()) == 0);
    EXPECT(jaxgpt_model_set_norm(model, JAXGPT_LN_F, 0, ones.data(), ones.data()) == 0);
    const int outputs[] = {96, 32, 128, 32}, inputs[] = {32, 32, 32, 128};
    for (int which = 0; which < 4; which++)
      with_linear(weights, kind, outputs[which], inputs[which], 0, false, [&](const jaxgpt_linear& linear) {
        EXPECT(jaxgpt_model_set_linear(model, which, 0, &linear) == 0);
      });
    const auto step = head(each.first, each.others);
    with_linear(weights, kind, 4099, 32, 0, true, [&](jaxgpt_linear linear) {
      linear.weight_scale = step.data();
      EXPECT(jaxgpt_model_set_head(model, &linear) == 0);
    });
    const auto rows = weights.bytes(4099 * 32);
    const auto row_scale = weights.floats(4099, 0.01f, 0.02f);
    EXPECT(jaxgpt_model_set_tokens(model, rows.data(), row_scale.data(), nullptr) == 0);
    EXPECT(jaxgpt_model_set_positions(model, rows.data(), row_scale.data()) == 0);
    EXPECT(jaxgpt_model_ready(model) == 0);
    jaxgpt_session* session = nullptr;
    EXPECT(jaxgpt_session_new(model, 1, JAXGPT_KV_FP16, &session) == 0);
    for (const int screened : {1, 0}) {
      EXPECT(jaxgpt_session_use_screen(session, screened) == 0);
      for (int token = 0; token < 12; token++) {
        int32_t best = 0;
        EXPECT(jaxgpt_session_truncate(session, 0, 0) == 0);
        const int rc = take_last(session, {token}, 0, &best);
        EXPECT(rc == JAXGPT_BAD_STATE || (best >= 0 && best < 4099));
      }
    }
    jaxgpt_session_free(session);
    jaxgpt_model_free(model);
  }
}

void from_several_threads(const char* isa) {
  const jaxgpt_shape shape = {2, 2, 40, 300, 4500, 1, 0, 8};
  jaxgpt_model* model = make_model(kKinds[0], shape, isa, 3, 0);
  std::vector<std::thread> users;
  std::vector<std::vector<int32_t>> chosen(4);
  for (int user = 0; user < 4; user++)
    users.emplace_back([&, user] {
      jaxgpt_session* session = nullptr;
      EXPECT(jaxgpt_session_new(model, 1 + user % 2, user % 3, &session) == 0);
      int32_t best = 0;
      EXPECT(take_last(session, text(259, 4500), 0, &best) == 0);
      for (int i = 0; i < 20; i++) {
        if (user == 3) EXPECT(jaxgpt_session_use_screen(session, i % 2) == 0);
        EXPECT(take_last(session, {best}, 0, &best) == 0);
        chosen[size_t(user)].push_back(best);
        EXPECT(take_last(session, {-1}, 0, &best) == JAXGPT_BAD_ARGUMENT);  // texts of errors are each thread's own
        EXPECT(strstr(jaxgpt_error(), "token -1"));
        best = chosen[size_t(user)].back();
      }
      jaxgpt_session_free(session);
    });
  // Meanwhile another model is loaded, whose steps take turns on the same threads, and slots are copied and released.
  users.emplace_back([&] {
    jaxgpt_model* other = make_model(kKinds[1], {1, 2, 40, 100, 300, 1, 0}, isa, 3, 0);
    jaxgpt_session* session = nullptr;
    EXPECT(jaxgpt_session_new(other, 2, JAXGPT_KV_FP16, &session) == 0);
    const std::vector<float> logits(300, 0.5f);
    for (int i = 0; i < 10; i++) {
      int32_t best = 0, copied = 0;
      EXPECT(jaxgpt_session_truncate(session, 0, 0) == 0);
      EXPECT(take_last(session, text(70, 300), 0, &best) == 0);
      EXPECT(jaxgpt_session_copy(session, 0, 1, 69) == 0);
      EXPECT(take_last(session, {text(70, 300).back()}, 1, &copied) == 0 && copied == best);
      EXPECT(jaxgpt_session_release(session, 1) == 0);
      check_top(other, 300, logits, {0});
      check_draw(other, 300, logits, {0});
    }
    jaxgpt_session_free(session);
    jaxgpt_model_free(other);
  });
  for (auto& user : users) user.join();
  EXPECT(chosen[0] == chosen[3]);  // both float caches of one slot or two: the same text
  // One session from several threads: what it says is of no use, but its memory holds.
  jaxgpt_session* shared = nullptr;
  EXPECT(jaxgpt_session_new(model, 1, JAXGPT_KV_FP16, &shared) == 0);
  users.clear();
  for (int user = 0; user < 4; user++)
    users.emplace_back([&, user] {
      int32_t best = 0;
      for (int i = 0; i < 12; i++) {
        take_last(shared, text(40, 4500), 0, &best);
        if (user == 0) jaxgpt_session_truncate(shared, 0, 0);
        EXPECT(jaxgpt_session_length(shared, 0) <= 300);
        EXPECT(jaxgpt_session_exact_outputs(shared) >= 0);
      }
    });
  for (auto& user : users) user.join();
  jaxgpt_session_free(shared);
  jaxgpt_model_free(model);
}

}  // namespace

int main(int count, char** words) {
  const std::string which = count > 1 ? words[1] : "all";
  const std::string sets = jaxgpt_instruction_sets();
  EXPECT(jaxgpt_version() == JAXGPT_ENGINE_VERSION);
  for (size_t at = 0; at < sets.size();) {
    const size_t end = std::min(sets.find(' ', at), sets.size());
    const std::string isa = sets.substr(at, end - at);
    at = end + 1;
    if (which == "threads") {
      from_several_threads(isa.c_str());
      printf("%s: threads\n", isa.c_str());
      continue;
    }
    int tours = 0;
    for (const Kind& kind : kKinds)
      for (const int kv : {JAXGPT_KV_FP32, JAXGPT_KV_FP16, JAXGPT_KV_INT8}) {
        // n_layer, n_head, n_embd, block_size, vocab_size, tied, rotary
        const jaxgpt_shape shapes[] = {
            {2, 3, 72, 300, 131, 1, 0},  // heads of 24, widths of 72, 216, 288
            {1, 2, 40, 270, 67, 0, 1},   // heads of 20, rotary, a head of its own
            {1, 8, 8, 5, 1, 1, 0},       // heads of 1, one token
        };
        for (const jaxgpt_shape& shape : shapes) {
          tour(kind, shape, isa.c_str(), kv, 1 + tours % 3, 8);
          tours++;
        }
        if (kv == JAXGPT_KV_FP16) {
          tour(kind, {1, 1, 80, 40, 4099, 1, 0}, isa.c_str(), kv, 2, 16);   // a head with a screen
          tour(kind, {1, 2, 144, 33, 4096, 0, 1}, isa.c_str(), kv, 2, 24);  // groups that do not divide 64
          tours += 2;
        }
      }
    overflows(isa.c_str());
    printf("%s: %d models\n", isa.c_str(), tours);
  }
  if (which == "all") refusals();
  return 0;
}
