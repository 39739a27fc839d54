// The head: logits of rows, or only the most probable token of each.
//
// For the latter a step need not read the whole head. The screen is the upper half of each of its bytes, which lie
// together (see layout.h), with a step of 16:
//
//   integer w = 16 (hi - 8) + lo,  hi and lo in 0..15
//   logit     = s_w s_x sum(w x) = s_w (16 s_x sum((hi - 8) x) + 7.5 s_x sum(x)) + error
//   |error|  <= s_w |lo - 7.5| s_x |x|      by Cauchy-Schwarz; |lo - 7.5|, the norm over a row, is kept
//
// One pass over the screen gives each logit an upper bound. The tokens beside the most promising one are computed
// exactly; then so is every token whose bound reaches the best of them, and no other can be the largest. How many
// these are is the text's business (0.2 % to 1 % with trained models, most with random ones), so a session that
// finds many leaves the screen alone for some steps.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "session.h"

namespace {

constexpr int kColumn = 16;             // outputs that are computed exactly together: they share their lines
constexpr int kColumns = kTile / kColumn;
constexpr int kFewestTiles = 64;        // a smaller head is read sooner than it is screened
constexpr int kWidest = 4096;           // inputs; more could overflow the integer sums of the screen
constexpr double kMostColumns = 0.25;   // of all, from which on the screen costs as much as it saves
constexpr int kLongestRest = 256;       // steps without it; after them it is given up
// Floats round: relative 1e-6 of the largest a sum could be covers every rounding of both sides.
constexpr float kRounding = 1e-6f * 128;

}  // namespace

bool jaxgpt_model::screens() const {
  return use_screen && head.halves && head.tiles() >= kFewestTiles && head.inputs <= kWidest;
}

// How far a logit can be from its screened value, for an input of length 1.
void jaxgpt_model::bound_screen() {
  const int width = padded(head.inputs);
  screen_error.assign(size_t(head.tiles()) * kTile, 0.0f);
  pool.run(head.tiles(), [&](int t) {
    const uint8_t* lower = head.lower(t);
    float squares[kStepBytes] = {};
    for (int k = 0; k < width; k += 8, lower += kStepBytes)
      for (int i = 0; i < kStepBytes; i++) {
        const float a = float(lower[i] & 15) - 7.5f, b = float(lower[i] >> 4) - 7.5f;
        squares[i] += a * a + b * b;
      }
    for (int o = 0; o < kTile; o++) {
      const float square = squares[4 * o] + squares[4 * o + 1] + squares[4 * o + 2] + squares[4 * o + 3];
      screen_error[size_t(t) * kTile + size_t(o)] =
          head.steps8(t)[o] * (std::sqrt(square) + kRounding * std::sqrt(float(width)));
    }
  });
}

// Exact logits of 16 outputs for the row that is rounded.
void jaxgpt_session::exact_column(int column, float* y) const {
  const Matrix& head = model.head;
  const int tile = column / kColumns, first = column % kColumns * kColumn;
  alignas(64) int32_t sums[2 * kTile];
  alignas(64) float all[kTile];
  const uint8_t* bytes = joined(head, tile, first, kColumn) + first * 4;
  model.kernels->column8(bytes, padded(head.inputs), integers_.as<int8_t>(), padded(head.inputs), head.parts(),
                         starts_.data(), sums + first);
  model.kernels->finish8(sums, head.fine ? sums + kTile : nullptr, steps_[0].scale, head.steps8(tile), nullptr, all);
  std::copy(all + first, all + first + kColumn, y);
}

// The largest of a column's real outputs, the first of equals; its logit goes to *most.
int jaxgpt_session::best_of_column(int column, float* most) const {
  float y[kColumn];
  exact_column(column, y);
  const int real = std::min(kColumn, model.shape.vocab_size - column * kColumn);
  const int at = model.kernels->largest(y, real);
  if (at < 0) refuse("the model's logits hold NaN or infinity; its weights are damaged");
  *most = y[at];
  return column * kColumn + at;
}

// The most probable token of the one row that is rounded for the head; -1 where too many outputs could be it.
int jaxgpt_session::screened_best() {
  const Kernels& k = *model.kernels;
  const Matrix& head = model.head;
  const int width = padded(head.inputs), tiles = head.tiles(), V = model.shape.vocab_size;
  int8_t* q = integers_.as<int8_t>();
  if (!head.fine) memset(q + width, 0, size_t(width));
  int64_t sum = 0;
  double square = 0;
  for (int i = 0; i < width; i++) {
    const int both = 256 * q[i] + q[width + i];
    sum += both;
    square += double(both) * both;
  }
  const float scale = steps_[0].scale, middle = 7.5f * scale * float(sum) / 256.0f;
  const float length = scale * float(std::sqrt(square)) / 256.0f * 1.0001f;
  group_sums_.assign(1, int32_t(8 * sum));
  upper_.resize(size_t(tiles) * kTile);
  most_.resize(size_t(tiles));
  if (model.screen_error.empty()) model.bound_screen();
  constexpr uint16_t kOne = 0x3f80;  // 1 in bfloat16
  uint16_t ones[kTile];
  std::fill(ones, ones + kTile, kOne);
  model.pool.run(tiles, [&](int tile) {
    alignas(64) float coarse[kTile];
    k.dot4(head.weights(tile), ones, width, width, q, width, 1, group_sums_.data(), coarse);
    const size_t first = size_t(tile) * kTile;
    k.bounds(coarse, scale / 16.0f, middle, length, head.steps8(tile), &model.screen_error[first], &upper_[first]);
    for (int o = std::max(0, V - tile * kTile); o < kTile; o++) upper_[first + size_t(o)] = -INFINITY;
    most_[size_t(tile)] = k.most(&upper_[first], kTile);
  });
  const size_t promising = size_t(std::max_element(most_.begin(), most_.end()) - most_.begin());
  const float* row = &upper_[promising * kTile];
  const int first_column = int(std::max_element(row, row + kTile) - row) / kColumn + int(promising) * kColumns;
  float reached = 0;
  const int promised = best_of_column(first_column, &reached);
  columns_.clear();
  for (int tile = 0; tile < tiles; tile++)
    if (most_[size_t(tile)] >= reached)
      for (int c = 0; c < kColumns; c++)
        if (k.most(&upper_[size_t(tile) * kTile + size_t(c) * kColumn], kColumn) >= reached)
          columns_.push_back(tile * kColumns + c);
  if (columns_.empty()) return promised;
  const bool many = double(columns_.size()) > kMostColumns * double(tiles * kColumns);
  rest_ = many ? 2 * rest_ + 1 : 0;
  resting_ = rest_;
  if (rest_ > kLongestRest) model.use_screen = false;
  if (many) return -1;
  columns_read += int64_t(columns_.size());
  std::vector<float> found(columns_.size());
  std::vector<int> at(columns_.size());
  model.pool.run(int(columns_.size()),
                 [&](int i) { at[size_t(i)] = best_of_column(columns_[size_t(i)], &found[size_t(i)]); });
  const size_t best = size_t(std::max_element(found.begin(), found.end()) - found.begin());  // the first of equals
  return at[best];
}

// Logits of the wanted rows of a chunk, or the most probable token of each.
void jaxgpt_session::predict(int rows, const uint8_t* wanted, float* logits, int32_t* best) {
  const int C = padded(model.shape.n_embd), V = model.shape.vocab_size;
  float* stream = stream_.as<float>();
  int count = 0;
  for (int m = 0; m < rows; m++)
    if (wanted[m]) {
      if (count != m) memcpy(stream + size_t(count) * size_t(C), stream + size_t(m) * size_t(C), size_t(C) * 4);
      count++;
    }
  if (!count) return;
  const Kernels& k = *model.kernels;
  const int tiles = model.head.tiles();
  round_rows(model.head, stream, C, count, &model.last_norm);
  if (count == 1 && best && !logits && model.screens() && resting_-- <= 0) {
    best[0] = screened_best();
    if (best[0] >= 0) return;
  }
  expect_heads(0);  // of the next step
  const size_t stride = logits ? size_t(V) : size_t(tiles) * kTile, lanes = size_t(tiles) * kColumn;
  if (!logits) logits_.resize(size_t(count) * stride);
  if (best) lanes_.resize(size_t(count) * lanes);
  float* all = logits ? logits : logits_.data();
  multiply(model.head, count, [&](int tile, float* y) {
    const int real = std::min(kTile, V - tile * kTile);
    for (int m = 0; m < count; m++, y += kTile) {
      memcpy(all + size_t(m) * stride + tile * kTile, y, size_t(real) * sizeof(float));
      if (!best) continue;
      std::fill(y + real, y + kTile, -FLT_MAX);
      k.fold(y, &lanes_[size_t(m) * lanes + size_t(tile) * kColumn]);
    }
  });
  for (int m = 0; best && m < count; m++) {
    const int lane = k.largest(&lanes_[size_t(m) * lanes], int(lanes));
    if (lane < 0) refuse("the model's logits hold NaN or infinity; its weights are damaged");
    const int first = lane / kColumn * kTile;
    best[m] = first + k.largest(all + size_t(m) * stride + first, std::min(kTile, V - first));
  }
}
