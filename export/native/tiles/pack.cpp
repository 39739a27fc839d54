// Packing: weights as an artifact has them, into the tiles of layout.h.
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "model.h"
#include "runtime/errors.h"

namespace {

// One tile of a matrix (O, I) of bytes, from output `first` on; it has zeros (128) wherever there is no input.
void pack8(const int8_t* weight, int outputs, int inputs, int first, uint8_t* tile) {
  memset(tile, 128, size_t(kTile) * size_t(padded(inputs)));
  for (int o = 0; o < kTile && first + o < outputs; o++) {
    const int8_t* row = weight + size_t(first + o) * size_t(inputs);
    uint8_t* to = tile + o * 4;
    int k = 0;
    for (; k + 4 <= inputs; k += 4, to += kSliceBytes) {
      uint32_t four;
      memcpy(&four, row + k, 4);
      four ^= 0x80808080u;
      memcpy(to, &four, 4);
    }
    for (int j = 0; k + j < inputs; j++) to[j] = uint8_t(row[k + j] + 128);
  }
}

// The nibble planes of a tile of bytes.
void split_planes(const uint8_t* tile, int inputs, uint8_t* hi, uint8_t* lo) {
  for (int k = 0; k < padded(inputs); k += 8, tile += 2 * kSliceBytes, hi += kSliceBytes, lo += kSliceBytes)
    for (int i = 0; i < kSliceBytes; i++) {
      const uint8_t first = tile[i], second = tile[kSliceBytes + i];
      hi[i] = uint8_t(first >> 4 | (second & 0xf0));
      lo[i] = uint8_t((first & 15) | second << 4);
    }
}

// The same of 4 bits: a slice's byte j has input j low and input 4 + j high.
void pack4(const uint8_t* weight, int outputs, int inputs, int first, uint8_t* tile) {
  memset(tile, 0x88, size_t(kTile) * size_t(padded(inputs)) / 2);
  for (int o = 0; o < kTile && first + o < outputs; o++) {
    const uint8_t* row = weight + size_t(first + o) * size_t(inputs / 2);
    uint8_t* to = tile + o * 4;
    for (int k = 0; k < inputs; k += 8, to += kSliceBytes) {
      uint8_t q[8];
      for (int j = 0; j < 8; j++) {
        const int at = k + j;
        q[j] = at >= inputs ? 8 : at % 2 ? row[at / 2] >> 4 : row[at / 2] & 15;
      }
      for (int j = 0; j < 4; j++) to[j] = uint8_t(q[j] | q[4 + j] << 4);
    }
  }
}

// One tile of floats, of an integer type as wide: the outputs of an input side by side.
template <typename Bits>
void pack_floats(const Bits* weight, int outputs, int inputs, int first, Bits* tile) {
  const int real = std::min(kTile, outputs - first);
  constexpr int kBlock = 16;  // of inputs: both sides stay in the first cache
  for (int k = 0; k < inputs; k += kBlock)
    for (int o = 0; o < real; o++) {
      const Bits* row = weight + size_t(first + o) * size_t(inputs);
      for (int i = k; i < inputs && i < k + kBlock; i++) tile[size_t(i) * kTile + size_t(o)] = row[i];
    }
}

void check_linear(const jaxgpt_linear& linear, int outputs, int inputs, const char* name) {
  if (linear.outputs != outputs || linear.inputs != inputs)
    throw_error(JAXGPT_BAD_ARGUMENT, "%s is (%d, %d), expected (%d, %d)", name, linear.outputs, linear.inputs, outputs,
                inputs);
  const bool floats = linear.bits == 16 || linear.bits == 32;
  if (!floats && linear.bits != 8 && linear.bits != 4)
    throw_error(JAXGPT_BAD_ARGUMENT, "%s has %d bits, expected 4, 8, 16 or 32", name, linear.bits);
  if (!linear.weight || (!floats && !linear.weight_scale))
    throw_error(JAXGPT_BAD_ARGUMENT, "%s has no weight or no scale", name);
  if (floats && (linear.smooth || linear.input_scale != 0 || linear.two_level))
    throw_error(JAXGPT_BAD_ARGUMENT, "%s: float weights take inputs as they are, not smoothed or rounded", name);
  if (linear.bits == 4 && (linear.group_size < 8 || linear.group_size % 8 || linear.group_size > 2048 ||
                           inputs % linear.group_size || linear.smooth || linear.input_scale != 0))
    throw_error(JAXGPT_BAD_ARGUMENT,
                "%s: 4 bits in groups of %d are not for this engine; expected groups of 8, 16, ... 2048 that divide %d",
                name, linear.group_size, inputs);
  if (!(linear.input_scale >= 0 && linear.input_scale < 1e30f))
    throw_error(JAXGPT_BAD_ARGUMENT, "%s has an input scale that is no scale", name);
}

}  // namespace

void jaxgpt_model::set_matrix(Matrix& matrix, const jaxgpt_linear& linear, int outputs, int inputs,
                              const char* name, bool nibble_planes) {
  check_linear(linear, outputs, inputs, name);
  if (linear.bits > shape.max_bits)
    throw_error(JAXGPT_BAD_ARGUMENT, "%s has %d bits, the shape says at most %d", name, linear.bits, shape.max_bits);
  if (matrix.outputs) throw_error(JAXGPT_BAD_STATE, "%s is set twice", name);
  Matrix packed;
  packed.outputs = outputs;
  packed.inputs = inputs;
  packed.bits = linear.bits;
  packed.group = linear.bits == 4 ? linear.group_size : 0;
  packed.two_level = linear.two_level || linear.bits == 4;
  packed.input_scale = linear.input_scale;
  packed.has_bias = linear.bias != nullptr;
  packed.qkv_tile_group = matrix.qkv_tile_group;
  if (linear.smooth) packed.smooth.assign(linear.smooth, linear.smooth + inputs);
  packed.nibble_planes = nibble_planes && linear.bits == 8;
  const size_t lo_plane_bytes = packed.nibble_planes ? packed.weight_bytes() : 0;
  packed.tiles_start = allocate(size_t(packed.tiles()) * (packed.tile_bytes() + lo_plane_bytes));
  matrix = std::move(packed);
  std::lock_guard<std::mutex> lock(step_mutex);  // another model of these threads may be at work
  pool.run(matrix.tiles(), [&](int t) {
    const int first = matrix.first_output(t), real = std::min(kTile, outputs - first);
    if (linear.bias) std::copy(linear.bias + first, linear.bias + first + real, matrix.bias(t));
    if (linear.bits == 32)
      return pack_floats(static_cast<const uint32_t*>(linear.weight), outputs, inputs, first,
                         reinterpret_cast<uint32_t*>(matrix.weights(t)));
    if (linear.bits == 16)
      return pack_floats(static_cast<const uint16_t*>(linear.weight), outputs, inputs, first,
                         reinterpret_cast<uint16_t*>(matrix.weights(t)));
    if (linear.bits == 8) {
      const auto* scale = static_cast<const float*>(linear.weight_scale) + first;
      std::copy(scale, scale + real, matrix.scales8(t));
      const auto* weight = static_cast<const int8_t*>(linear.weight);
      if (matrix.nibble_planes) {
        static thread_local std::vector<uint8_t> whole;
        whole.resize(size_t(kTile) * size_t(padded(inputs)));
        pack8(weight, outputs, inputs, first, whole.data());
        split_planes(whole.data(), inputs, matrix.weights(t), matrix.lo_plane(t));
      } else {
        pack8(weight, outputs, inputs, first, matrix.weights(t));
      }
      return;
    }
    const int stored = inputs / matrix.group;
    const auto* scale = static_cast<const uint16_t*>(linear.weight_scale) + size_t(first) * size_t(stored);
    for (int o = 0; o < real; o++)
      for (int g = 0; g < stored; g++) matrix.scales4(t)[g * kTile + o] = scale[size_t(o) * size_t(stored) + size_t(g)];
    pack4(static_cast<const uint8_t*>(linear.weight), outputs, inputs, first, matrix.weights(t));
  });
}
