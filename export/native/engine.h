// The C interface of the engine: what jaxgpt_export/native/ calls, and nothing else does.
//
// A model holds packed weights and threads. A session holds the keys and values of some texts (slots). Every call
// returns JAXGPT_OK or an error code with a text in jaxgpt_error() (one for each calling thread), also for a null
// pointer that is needed. Pointers that are passed in are read during the call only; nothing is kept. Sessions
// may be used from several threads: their forwards take turns. A model must outlive its sessions.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

#define JAXGPT_ENGINE_VERSION 8

enum {
  JAXGPT_OK,
  JAXGPT_BAD_ARGUMENT,   // a number or pointer that is none in any state
  JAXGPT_BAD_STATE,      // not with this model or session as it is: weights missing or damaged, a context that is full
  JAXGPT_OUT_OF_MEMORY,  // the system lends no more memory
  JAXGPT_FAILED          // anything else that the system refuses: threads
};

typedef struct jaxgpt_model jaxgpt_model;
typedef struct jaxgpt_session jaxgpt_session;

typedef struct {
  int32_t n_layer, n_head, n_embd, block_size, vocab_size;
  int32_t tied;    // the head is the token embedding
  int32_t rotary;  // positions rotate queries and keys; there is no position embedding
  int32_t max_bits;  // of a weight of any matrix, 8, 16 or 32
  // Bits of the weights of each matrix, four a layer in the order of JAXGPT_C_ATTN ... and the head: so much memory
  // is set aside; null: max_bits each.
  const uint8_t* bits;
} jaxgpt_shape;

// A matrix (outputs, inputs) and what its layer does to its input; see model/arithmetic.py for what each means.
typedef struct {
  const void* weight;         // int8 (O, I); 4 bits: uint8 (O, I / 2); 16: float16 (O, I); 32: float (O, I)
  const void* weight_scale;   // float (O); 4 bits without factors: bfloat16 (O, I / group_size); 16 and 32: null
  const int8_t* group_factor; // 4 bits: int8 (O, I / group_size), by which a group's integers count; or null
  const float* bias;          // (O), or null
  const float* smooth;        // (I) that divides the input, or null
  int32_t outputs, inputs;
  int32_t bits;               // 4, 8, 16 or 32; the input of 16 and 32 stays float
  int32_t group_size;         // 4 bits: inputs that share a scale
  int32_t two_level;          // the input's residual is quantized too; always so with 4 bits without factors
  float input_scale;          // static scale of the input; 0: each row has its own
} jaxgpt_linear;

enum { JAXGPT_C_ATTN, JAXGPT_ATTN_C_PROJ, JAXGPT_C_FC, JAXGPT_MLP_C_PROJ };  // which matrix of a layer
enum { JAXGPT_LN_1, JAXGPT_LN_2, JAXGPT_LN_F };
enum { JAXGPT_KV_FP32, JAXGPT_KV_FP16, JAXGPT_KV_INT8 };

const char* jaxgpt_error(void);
int jaxgpt_version(void);

// Names of the instruction sets that this machine and this build have, the best one first, separated by spaces.
const char* jaxgpt_instruction_sets(void);

// isa: one of the names above, or null for the best.
int jaxgpt_model_new(const jaxgpt_shape* shape, const char* isa, int threads, jaxgpt_model** model);
int jaxgpt_model_set_norm(jaxgpt_model* model, int which, int layer, const float* gain, const float* bias);
int jaxgpt_model_set_linear(jaxgpt_model* model, int which, int layer, const jaxgpt_linear* linear);
int jaxgpt_model_set_head(jaxgpt_model* model, const jaxgpt_linear* linear);
// Rows (V, C) and (block_size, C): int8 with a scale each, or, without scales, float. Tied: only `smooth` is taken, by
// which the rows that the head has are divided.
int jaxgpt_model_set_tokens(jaxgpt_model* model, const void* rows, const float* scale, const float* smooth);
int jaxgpt_model_set_positions(jaxgpt_model* model, const void* rows, const float* scale);
// Cosines and sines (2, block_size, C / n_head).
int jaxgpt_model_set_rope_table(jaxgpt_model* model, const float* table);
// Checks that nothing is missing; sessions come after it, and no more weights.
int jaxgpt_model_ready(jaxgpt_model* model);
const char* jaxgpt_model_isa(const jaxgpt_model* model);
// Bytes of weights and scales that a decode step reads: what the ceiling is made of.
int64_t jaxgpt_model_bytes(const jaxgpt_model* model);
void jaxgpt_model_free(jaxgpt_model* model);

// kv: JAXGPT_KV_*, what keys and values are kept as.
int jaxgpt_session_new(jaxgpt_model* model, int slots, int kv, jaxgpt_session** session);
void jaxgpt_session_free(jaxgpt_session* session);
// Forgets the tokens of a slot from `length` on.
int jaxgpt_session_truncate(jaxgpt_session* session, int slot, int length);
// Lets slot `to` hold the first `length` tokens of slot `from`, and nothing else.
int jaxgpt_session_copy(jaxgpt_session* session, int from, int to, int length);
// Forgets a slot and gives its memory back to the system.
int jaxgpt_session_release(jaxgpt_session* session, int slot);
// Lets the system back the memory of a slot's first `tokens` positions now, so that no step waits for it; what the
// slot holds stays.
int jaxgpt_session_touch(jaxgpt_session* session, int slot, int tokens);
// Bytes of keys and values of a token, in all layers.
int64_t jaxgpt_session_bytes_per_token(const jaxgpt_session* session);
// -1 where there is no such slot. Does not wait for a step that runs.
int jaxgpt_session_length(const jaxgpt_session* session, int slot);
// Whether this session's single rows of which only the most probable token is wanted go through the head's screen
// (see logits/head.cpp); they do unless told otherwise. The result is the same.
int jaxgpt_session_use_screen(jaxgpt_session* session, int use);
// Outputs of the head that screened steps computed exactly so far.
int64_t jaxgpt_session_exact_outputs(const jaxgpt_session* session);

// Takes `rows` tokens, each the next one of its slot; rows of one slot must be neighbours.
//   wanted   (rows) 1 for rows whose result is wanted, in order
//   logits   (wanted, vocab_size), or null
//   best     (wanted) the most probable token of each, the lowest of equals; or null
// After an error, such as logits that are not finite where `best` is wanted, every slot holds what it held
// before.
int jaxgpt_session_forward(jaxgpt_session* session, int rows, const int32_t* slots, const int32_t* tokens,
                           const uint8_t* wanted, float* logits, int32_t* best);
// Decodes greedily: a slot takes `token`, then each most probable next one but the last.
//   stop_token  a token that ends the text; -1: none does
//   tokens      (max_tokens) what follows `token`
//   count       how many of them there are: max_tokens, or fewer where stop_token is the last
// The slot must have room for max_tokens tokens. After an error it holds what it held before.
int jaxgpt_session_decode_greedy(jaxgpt_session* session, int32_t slot, int32_t token, int32_t max_tokens,
                                 int32_t stop_token, int32_t* tokens, int32_t* count);

// What scoring needs of rows of logits, so that nobody has to walk through a vocabulary twice. The order of each row's
// sum depends on `columns` alone.
//   logits       (rows, columns)
//   temperature  (rows), positive
//   ids          (rows, k) the k largest of each, the largest first, the lower of equals first; k <= columns
//   scaled       (rows, k) (logit - largest) / temperature of these
//   total        (rows) the sum of exp((logit - largest) / temperature) over all columns
//   finite       (rows) 0 where a logit is not: nothing else is set for it
int jaxgpt_top(jaxgpt_model* model, int rows, int columns, const float* logits, const double* temperature, int k,
               int32_t* ids, double* scaled, double* total, uint8_t* finite);

// How a token is drawn: what Sampling of jaxgpt/generation/sampling.py says.
typedef struct {
  double temperature;  // 0: the most probable token
  double top_p, min_p;
  double uniform;      // a random number in [0, 1)
  int32_t top_k;       // 0: all
} jaxgpt_sampling;

// Draws a token from each of (rows, columns) logits: the one at which the cumulative probability, the most probable
// first, the lower of equals first, passes `uniform`. The order of the sums depends on nothing but the row.
//   sampling  (rows)
//   tokens    (rows) -1 where a logit is not finite
int jaxgpt_draw(jaxgpt_model* model, int rows, int columns, const float* logits, const jaxgpt_sampling* sampling,
                int32_t* tokens);

// For tests: the exact integer sums (rows, outputs) of a matrix of 8 bits and integers (rows, inputs).
int jaxgpt_sums(const char* isa, const int8_t* weight, int outputs, int inputs, const int8_t* x, int rows,
                int32_t* sums);
// For benchmarks: reads `bytes` on huge pages with so many threads, `passes` times; seconds of each.
int jaxgpt_read_seconds(int64_t bytes, int threads, int passes, double* seconds);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
