// The head: logits of rows, or only the most probable token of each.
//
// For the latter a step need not read the whole head. The screen is the hi nibble of each of its bytes, which lie
// together (see layout.h), with a scale of 16:
//
//   integer w = 16 (hi - 8) + lo,  hi and lo in 0..15
//   logit     = s_w s_x sum(w x) = s_w (16 s_x sum((hi - 8) x) + 7.5 s_x sum(x)) + error
//   |error|  <= s_w |lo - 7.5| s_x |x|      by Cauchy-Schwarz; |lo - 7.5|, the norm over a row, is kept
//
// One pass over the screen gives each logit an upper bound. The column of 16 tokens that has the highest is computed
// exactly; then so is every column with a bound that reaches the best logit of these, and no other token can be the
// largest. How many these are depends on the text (0.2 % to 1 % with trained models, most with random ones), so a
// head that finds many does without the screen for a while: 1, 3, 7 ... steps (exponential backoff), at most 256.
// The next text may be one that it is good for.
#include "logits/head.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "runtime/errors.h"

namespace {

constexpr int kMinTiles = 64;           // a smaller head is read sooner than it is screened
constexpr int kMaxInputs = 4096;        // more could overflow the integer sums of the screen
constexpr double kMaxExactShare = 0.25; // of all columns, from which on the screen costs as much as it saves
constexpr int kMaxBackoff = 256;        // steps without it
// Floats round: relative 1e-6 of the largest a sum could be covers every rounding of both sides.
constexpr float kRounding = 1e-6f * 128;

[[noreturn]] void throw_damaged() {
  throw_error(JAXGPT_BAD_STATE, "the model's logits hold NaN or infinity; its weights are damaged");
}

}  // namespace

void Head::use_screen(bool use) {
  use_screen_ = use;
  backoff_ = backoff_left_ = 0;
}

bool Head::screens() const {
  const Matrix& head = model_.head;
  return use_screen_ && head.nibble_planes && head.tiles() >= kMinTiles && head.inputs <= kMaxInputs;
}

// Fills the model's screen_error: how far a logit can be from its screened value, for an input of length 1.
void Head::bound_screen() {
  const Matrix& head = model_.head;
  const int width = padded(head.inputs);
  model_.screen_error.assign(size_t(head.tiles()) * kTile, 0.0f);
  model_.pool.run(head.tiles(), [&](int t) {
    const uint8_t* lo = head.lo_plane(t);
    float squares[kSliceBytes] = {};
    for (int k = 0; k < width; k += 8, lo += kSliceBytes)
      for (int i = 0; i < kSliceBytes; i++) {
        const float a = float(lo[i] & 15) - 7.5f, b = float(lo[i] >> 4) - 7.5f;
        squares[i] += a * a + b * b;
      }
    for (int o = 0; o < kTile; o++) {
      const float square = squares[4 * o] + squares[4 * o + 1] + squares[4 * o + 2] + squares[4 * o + 3];
      model_.screen_error[size_t(t) * kTile + size_t(o)] =
          head.row_scales(t)[o] * (std::sqrt(square) + kRounding * std::sqrt(float(width)));
    }
  });
}

const std::vector<float>& Head::screen(InputRows& x) {
  const Kernels& k = *model_.kernels;
  const Matrix& head = model_.head;
  const int width = padded(head.inputs), tiles = head.tiles(), V = head.outputs;
  int8_t* q = x.integers.as<int8_t>();
  if (!head.two_level) memset(q + width, 0, size_t(width));  // dot4 takes rows and residuals
  int64_t sum = 0;
  double square = 0;
  for (int i = 0; i < width; i++) {
    const int both = 256 * q[i] + q[width + i];
    sum += both;
    square += double(both) * both;
  }
  const float scale = x.quants[0].scale, middle = 7.5f * scale * float(sum) / 256.0f;
  const float length = scale * float(std::sqrt(square)) / 256.0f * 1.0001f;
  x.group_sums.assign(1, int32_t(8 * sum));
  upper_bound_.resize(size_t(tiles) * kTile);
  tile_max_.resize(size_t(tiles));
  if (model_.screen_error.empty()) bound_screen();
  constexpr uint16_t kOne = 0x3f80;  // 1 in bfloat16
  uint16_t ones[kTile];
  std::fill(ones, ones + kTile, kOne);
  model_.pool.run(tiles, [&](int tile) {
    alignas(64) float coarse[kTile];
    k.dot4(head.weights(tile), ones, true, width, width, q, width, 1, x.group_sums.data(), coarse);
    const size_t first = size_t(tile) * kTile;
    float* upper = &upper_bound_[first];
    k.screen_bounds(coarse, scale / 16.0f, middle, length, head.row_scales(tile), &model_.screen_error[first], upper);
    for (int o = std::max(0, V - tile * kTile); o < kTile; o++) upper[o] = -INFINITY;
    tile_max_[size_t(tile)] = k.max(upper, kTile);
  });
  return upper_bound_;
}

// Exact logits of 16 outputs for the row that is quantized.
void Head::exact_column(const InputRows& x, int column, float* y) const {
  const Kernels& k = *model_.kernels;
  const Matrix& head = model_.head;
  const int tile = column / kColumns, first = column % kColumns * kColumn, width = padded(head.inputs);
  alignas(64) int32_t sums[2 * kTile];
  alignas(64) float all[kTile];
  const uint8_t* bytes = merged_planes(k, head, tile, first, kColumn) + first * 4;
  k.column8(bytes, width, x.integers.as<int8_t>(), width, head.parts(), x.starts.data(), sums + first);
  k.dequantize8(sums, head.two_level ? sums + kTile : nullptr, x.quants[0].scale, head.row_scales(tile), nullptr, all);
  std::copy(all + first, all + first + kColumn, y);
}

// The argmax of a column's real outputs, the first of equals; its logit goes to *max.
int Head::argmax_of_column(const InputRows& x, int column, float* max) const {
  float y[kColumn];
  exact_column(x, column, y);
  const int real = std::min(kColumn, model_.head.outputs - column * kColumn);
  const int at = model_.kernels->argmax(y, real);
  if (at < 0) throw_damaged();
  *max = y[at];
  return column * kColumn + at;
}

// Columns with a bound that reaches the threshold.
void Head::collect_candidates(float threshold) {
  const Kernels& k = *model_.kernels;
  candidates_.clear();
  for (int tile = 0; tile < model_.head.tiles(); tile++)
    if (tile_max_[size_t(tile)] >= threshold)
      for (int c = 0; c < kColumns; c++)
        if (k.max(&upper_bound_[size_t(tile) * kTile + size_t(c) * kColumn], kColumn) >= threshold)
          candidates_.push_back(tile * kColumns + c);
}

// Books whether the screen left too many candidates; returns whether it did.
bool Head::back_off(bool too_many) {
  backoff_ = too_many ? std::min(2 * backoff_ + 1, kMaxBackoff) : 0;
  backoff_left_ = backoff_;
  return too_many;
}

// The most probable token of the one row that is quantized; -1 where too many outputs could be it.
int Head::screened_argmax(InputRows& x) {
  if (std::isnan(x.quants[0].scale)) throw_damaged();
  screen(x);
  const size_t best_tile = size_t(std::max_element(tile_max_.begin(), tile_max_.end()) - tile_max_.begin());
  const float* row = &upper_bound_[best_tile * kTile];
  const int first_column = int(std::max_element(row, row + kTile) - row) / kColumn + int(best_tile) * kColumns;
  float threshold = 0;
  const int first_best = argmax_of_column(x, first_column, &threshold);
  collect_candidates(threshold);
  if (candidates_.empty()) return first_best;
  if (back_off(double(candidates_.size()) > kMaxExactShare * double(model_.head.tiles() * kColumns))) return -1;
  exact_columns_ += int64_t(candidates_.size());
  std::vector<float> max(candidates_.size());
  std::vector<int> at(candidates_.size());
  model_.pool.run(int(candidates_.size()), [&](int i) {
    at[size_t(i)] = argmax_of_column(x, candidates_[size_t(i)], &max[size_t(i)]);
  });
  return at[size_t(std::max_element(max.begin(), max.end()) - max.begin())];  // the first of equals
}

void Head::predict(InputRows& x, int rows, float* logits, int32_t* best) {
  if (rows == 1 && best && !logits && screens() && backoff_left_-- <= 0) {
    best[0] = screened_argmax(x);
    if (best[0] >= 0) return;
  }
  model_.prefetch_qkv(0);  // of the next step
  const Kernels& k = *model_.kernels;
  const Matrix& head = model_.head;
  const int tiles = head.tiles(), V = head.outputs;
  const size_t stride = logits ? size_t(V) : size_t(tiles) * kTile, lanes = size_t(tiles) * kColumn;
  if (!logits) logits_.resize(size_t(rows) * stride);
  if (best) lane_max_.resize(size_t(rows) * lanes);
  float* all = logits ? logits : logits_.data();
  multiply(
      model_, head, x, rows, [&](int tile) { return all + tile * kTile; },
      [&](int tile, float* y) {
        const int real = std::min(kTile, V - tile * kTile);
        for (int m = 0; m < rows; m++, y += kTile) {
          memcpy(all + size_t(m) * stride + tile * kTile, y, size_t(real) * sizeof(float));
          if (!best) continue;
          std::fill(y + real, y + kTile, -FLT_MAX);
          k.fold_max(y, &lane_max_[size_t(m) * lanes + size_t(tile) * kColumn]);
        }
      });
  for (int m = 0; best && m < rows; m++) {
    const int lane = k.argmax(&lane_max_[size_t(m) * lanes], int(lanes));
    if (lane < 0) throw_damaged();
    const int first = lane / kColumn * kTile;
    best[m] = first + k.argmax(all + size_t(m) * stride + first, std::min(kTile, V - first));
  }
}
