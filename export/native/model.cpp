#include "model.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

void refuse(const char* format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw std::runtime_error(text);
}

#if defined(__SANITIZE_ADDRESS__)

// From the allocator, and not a byte more than was asked for: the sanitizer sees what reaches beyond.
Pages::Pages(size_t bytes, bool) : bytes_(bytes) {
  constexpr size_t kMost = size_t(1) << 34;
  if (bytes > kMost || posix_memalign(reinterpret_cast<void**>(&start_), 64, std::max(bytes, size_t(1))))
    throw std::bad_alloc();
  memset(start_, 0, bytes);
}

Pages::~Pages() { free(start_); }

#else

Pages::Pages(size_t bytes, bool huge) : bytes_(bytes) {
  constexpr size_t kHuge = size_t(2) << 20;
  const size_t alignment = huge ? kHuge : 4096;
  mapped_ = (bytes + 2 * alignment - 1) / alignment * alignment;
  void* found = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) {
    mapped_ = 0;
    throw std::bad_alloc();
  }
  const uintptr_t aligned = (uintptr_t(found) + alignment - 1) / alignment * alignment;
  const size_t before = aligned - uintptr_t(found);
  if (before) munmap(found, before);
  mapped_ -= before;
  start_ = reinterpret_cast<uint8_t*>(aligned);
#if defined(MADV_HUGEPAGE)
  if (huge) madvise(start_, mapped_, MADV_HUGEPAGE);
#endif
}

Pages::~Pages() {
  if (start_) munmap(start_, mapped_);
}

#endif

size_t Matrix::bytes_read() const {
  const size_t scales = bits == 8 ? size_t(outputs) * 4 : size_t(outputs) * size_t(inputs / group) * 2;
  return size_t(outputs) * size_t(inputs) * size_t(bits) / 8 + scales;
}

jaxgpt_model::jaxgpt_model(const jaxgpt_shape& given, const Kernels* chosen, int threads)
    : shape(given), kernels(chosen), pool(threads), layers(size_t(given.n_layer)) {
  const int C = shape.n_embd;
  const auto room = [](int outputs, int inputs) {  // with steps for groups of 8, as small as they come, and biases
    return size_t(padded(outputs)) * (size_t(padded(inputs)) * 5 / 4 + 2 * sizeof(float));
  };
  const size_t layer = room(3 * C, C) + room(C, C) + room(4 * C, C) + room(C, 4 * C);
  pages = Pages(layer * size_t(shape.n_layer) + room(shape.vocab_size, C), true);
  for (Layer& one : layers) one.matrices[JAXGPT_C_ATTN].thirds = heads_together() * head_size() / kTile;
}

int jaxgpt_model::heads_together() const {
  const int D = head_size(), heads = D % kTile == 0 ? 1 : kTile % D == 0 ? kTile / D : 0;
  return heads && shape.n_head % heads == 0 ? heads : 0;
}

uint8_t* jaxgpt_model::take_pages(size_t bytes) {
  if (bytes > pages.bytes() - pages_used) refuse("the matrices take more room than the model's shape gives");
  uint8_t* taken = pages.as<uint8_t>() + pages_used;
  pages_used += bytes;
  return taken;
}

namespace {

// One tile of a matrix (O, I) of bytes, from output `first` on; dst has zeros (128) wherever there is no input.
void pack8(const int8_t* weight, int outputs, int inputs, int first, uint8_t* tile) {
  memset(tile, 128, size_t(kTile) * size_t(padded(inputs)));
  for (int o = 0; o < kTile && first + o < outputs; o++) {
    const int8_t* row = weight + size_t(first + o) * size_t(inputs);
    uint8_t* to = tile + o * 4;
    int k = 0;
    for (; k + 4 <= inputs; k += 4, to += kStepBytes) {
      uint32_t four;
      memcpy(&four, row + k, 4);
      four ^= 0x80808080u;
      memcpy(to, &four, 4);
    }
    for (int j = 0; k + j < inputs; j++) to[j] = uint8_t(row[k + j] + 128);
  }
}

float step_value(uint16_t bits) {  // of bfloat16
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  memcpy(&x, &wide, 4);
  return x;
}

// The halves of a tile of bytes.
void split(const uint8_t* tile, int inputs, uint8_t* upper, uint8_t* lower) {
  for (int k = 0; k < padded(inputs); k += 8, tile += 2 * kStepBytes, upper += kStepBytes, lower += kStepBytes)
    for (int i = 0; i < kStepBytes; i++) {
      const uint8_t first = tile[i], second = tile[kStepBytes + i];
      upper[i] = uint8_t(first >> 4 | (second & 0xf0));
      lower[i] = uint8_t((first & 15) | second << 4);
    }
}

// The same of 4 bits: a step's byte j has input j low and input 4 + j high.
void pack4(const uint8_t* weight, int outputs, int inputs, int first, uint8_t* tile) {
  memset(tile, 0x88, size_t(kTile) * size_t(padded(inputs)) / 2);
  for (int o = 0; o < kTile && first + o < outputs; o++) {
    const uint8_t* row = weight + size_t(first + o) * size_t(inputs / 2);
    uint8_t* to = tile + o * 4;
    for (int k = 0; k < inputs; k += 8, to += kStepBytes) {
      uint8_t q[8];
      for (int j = 0; j < 8; j++) {
        const int at = k + j;
        q[j] = at >= inputs ? 8 : at % 2 ? row[at / 2] >> 4 : row[at / 2] & 15;
      }
      for (int j = 0; j < 4; j++) to[j] = uint8_t(q[j] | q[4 + j] << 4);
    }
  }
}

}  // namespace

void jaxgpt_model::set_matrix(Matrix& matrix, const jaxgpt_linear& linear, int outputs, int inputs,
                              const char* name, bool as_halves) {
  if (linear.outputs != outputs || linear.inputs != inputs)
    refuse("%s is (%d, %d), expected (%d, %d)", name, linear.outputs, linear.inputs, outputs, inputs);
  if (!linear.weight || !linear.weight_scale) refuse("%s has no weight or no step", name);
  if (linear.bits != 8 && linear.bits != 4) refuse("%s has %d bits, expected 8 or 4", name, linear.bits);
  if (linear.bits == 4 && (linear.group_size < 8 || linear.group_size % 8 || linear.group_size > 2048 ||
                           inputs % linear.group_size || linear.smooth || linear.input_scale != 0))
    refuse("%s: 4 bits in groups of %d are not for this engine; expected groups of 8, 16, ... 2048 that divide %d",
           name, linear.group_size, inputs);
  if (!(linear.input_scale >= 0 && linear.input_scale < 1e30f)) refuse("%s has an input step that is no step", name);
  if (matrix.outputs) refuse("%s is set twice", name);
  Matrix made;
  made.outputs = outputs;
  made.inputs = inputs;
  made.bits = linear.bits;
  made.group = linear.bits == 4 ? linear.group_size : 0;
  made.fine = linear.fine || linear.bits == 4;
  made.input_scale = linear.input_scale;
  made.has_bias = linear.bias != nullptr;
  made.thirds = matrix.thirds;
  if (linear.smooth) made.smooth.assign(linear.smooth, linear.smooth + inputs);
  made.halves = as_halves && linear.bits == 8;
  made.tiles_start = take_pages(size_t(made.tiles()) * (made.tile_bytes() + (made.halves ? made.weight_bytes() : 0)));
  matrix = std::move(made);
  pool.run(matrix.tiles(), [&](int t) {
    const int first = matrix.first_output(t), real = std::min(kTile, outputs - first);
    if (linear.bias) std::copy(linear.bias + first, linear.bias + first + real, matrix.bias(t));
    if (linear.bits == 8) {
      const auto* scale = static_cast<const float*>(linear.weight_scale) + first;
      std::copy(scale, scale + real, matrix.steps8(t));
      const auto* weight = static_cast<const int8_t*>(linear.weight);
      if (matrix.halves) {
        static thread_local std::vector<uint8_t> whole;
        whole.resize(size_t(kTile) * size_t(padded(inputs)));
        pack8(weight, outputs, inputs, first, whole.data());
        split(whole.data(), inputs, matrix.weights(t), matrix.lower(t));
      } else {
        pack8(weight, outputs, inputs, first, matrix.weights(t));
      }
      return;
    }
    const int stored = inputs / matrix.group;
    const auto* scale = static_cast<const uint16_t*>(linear.weight_scale) + size_t(first) * size_t(stored);
    for (int o = 0; o < real; o++)
      for (int g = 0; g < stored; g++) matrix.steps4(t)[g * kTile + o] = scale[size_t(o) * size_t(stored) + size_t(g)];
    pack4(static_cast<const uint8_t*>(linear.weight), outputs, inputs, first, matrix.weights(t));
  });
}

void jaxgpt_model::check_complete() {
  const auto whole = [&](const Norm& norm) { return int(norm.gain.size()) == shape.n_embd; };
  bytes_read = 0;
  for (const Layer& layer : layers) {
    if (!whole(layer.norms[0]) || !whole(layer.norms[1])) refuse("a layer has no norms");
    for (const Matrix& matrix : layer.matrices) {
      if (!matrix.outputs) refuse("a layer lacks a matrix");
      bytes_read += int64_t(matrix.bytes_read());
    }
  }
  if (!whole(last_norm) || !head.outputs) refuse("the head or its norm is missing");
  bytes_read += int64_t(head.bytes_read());
  if (!tokens_set) refuse("the token embedding is missing");
  if (shape.rotary ? turns.empty() : position_rows.empty()) refuse("the positions are missing");
  ready = true;
}

void jaxgpt_model::turn_by(int position, const float* from, float* to) const {
  const int D = head_size(), half = D / 2;
  const float* cosine = &turns[size_t(position) * size_t(D)];
  const float* sine = cosine + size_t(shape.block_size) * size_t(D);
  for (int i = 0; i < half; i++) {
    to[i] = from[i] * cosine[i] - from[half + i] * sine[i];
    to[half + i] = from[half + i] * cosine[half + i] + from[i] * sine[half + i];
  }
}

// A row of the head, of half bytes in its tiles.
void jaxgpt_model::embed_from_head(int token, float* x) const {
  const int tile = token / kTile, output = token % kTile;
  const uint8_t* row = head.weights(tile) + output * 4;
  const uint8_t* lower = head.halves ? head.lower(tile) + output * 4 : nullptr;
  for (int i = 0; i < shape.n_embd; i++) {
    const int at = i / 8 * kStepBytes + i % 4, shift = i % 8 / 4 * 4;
    const int half = (row[at] >> shift & 15) - 8;
    if (lower)
      x[i] = float(16 * half + (lower[at] >> shift & 15)) * head.steps8(tile)[output];
    else
      x[i] = float(half) * step_value(head.steps4(tile)[i / head.group * kTile + output]);
  }
}

void jaxgpt_model::embed(int token, int position, float* x) const {
  const int C = shape.n_embd;
  if (shape.tied) {
    embed_from_head(token, x);
  } else {
    const int8_t* row = &token_rows[size_t(token) * size_t(C)];
    for (int i = 0; i < C; i++) x[i] = float(row[i]) * token_scale[size_t(token)];
  }
  if (!token_smooth.empty())
    for (int i = 0; i < C; i++) x[i] /= token_smooth[size_t(i)];
  if (shape.rotary) return;
  const int8_t* row = &position_rows[size_t(position) * size_t(C)];
  for (int i = 0; i < C; i++) x[i] += float(row[i]) * position_scale[size_t(position)];
}
