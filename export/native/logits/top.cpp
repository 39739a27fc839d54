// The largest of each row are found through the maxima of its blocks: the k-th largest of these is a bound that at least
// k logits reach and few others do.
#include "logits/top.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <utility>

namespace {

constexpr int kPieceBlocks = 64;             // blocks of a piece that one thread takes
constexpr int kPiece = kBlock64 * kPieceBlocks;

struct Column {
  uint32_t key;  // grows as the logit falls
  int32_t id;
};

uint32_t falling_key(float x) {
  uint32_t bits;
  x += 0.0f;  // -0 is equal to 0
  memcpy(&bits, &x, sizeof bits);
  return bits >> 31 ? bits : ~bits & 0x7fffffff;
}

// All columns, the largest first, the lower id of equals first: by digits of 11 bits, the lowest digit first. An eighth
// of the time that sorting by comparisons takes.
std::vector<Column> sorted_columns(const float* x, int n) {
  constexpr int kBits = 11, kDigits = 3, kValues = 1 << kBits;
  std::vector<Column> columns(static_cast<size_t>(n)), others(static_cast<size_t>(n));
  std::vector<uint32_t> counts(kDigits * kValues);
  const auto digit = [](uint32_t key, int d) { return size_t(key >> (d * kBits) & (kValues - 1)); };
  for (int c = 0; c < n; c++) {
    const uint32_t key = falling_key(x[c]);
    columns[size_t(c)] = {key, c};
    for (int d = 0; d < kDigits; d++) counts[size_t(d * kValues) + digit(key, d)]++;
  }
  for (int d = 0; d < kDigits; d++) {
    uint32_t* next = &counts[size_t(d * kValues)];
    uint32_t place = 0;
    for (int value = 0; value < kValues; value++) place += std::exchange(next[value], place);
    for (const Column& column : columns) others[next[digit(column.key, d)]++] = column;
    columns.swap(others);
  }
  return columns;
}

// The k largest where every block of 64 columns may hold some of them, or few do.
std::vector<int32_t> largest_columns(const float* x, int columns, const float* block_max, int k) {
  const int blocks = (columns + kBlock64 - 1) / kBlock64;
  std::vector<int32_t> found;
  if (blocks <= k) {
    for (const Column& column : sorted_columns(x, columns)) found.push_back(column.id);
    return found;
  }
  std::vector<float> maxima(block_max, block_max + blocks);
  std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), std::greater<float>());
  const float bound = maxima[size_t(k - 1)];
  for (int block = 0; block < blocks; block++)
    if (block_max[block] >= bound)
      for (int c = block * kBlock64; c < std::min(columns, (block + 1) * kBlock64); c++)
        if (x[c] >= bound) found.push_back(c);
  const auto before = [&](int32_t a, int32_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); };
  std::partial_sort(found.begin(), found.begin() + k, found.end(), before);
  return found;
}

}  // namespace

std::vector<float> block_maxima(jaxgpt_model& model, int rows, int columns, const float* logits) {
  const int blocks = (columns + kBlock64 - 1) / kBlock64, pieces = (columns + kPiece - 1) / kPiece;
  std::vector<float> found(size_t(rows) * size_t(blocks));
  model.pool.run(rows * pieces, [&](int i) {
    const int row = i / pieces, first = i % pieces * kPieceBlocks;
    for (int block = first; block < std::min(blocks, first + kPieceBlocks); block++) {
      const float* x = logits + size_t(row) * size_t(columns) + block * kBlock64;
      const int at = model.kernels->argmax(x, std::min(kBlock64, columns - block * kBlock64));
      found[size_t(row) * size_t(blocks) + size_t(block)] = at < 0 ? NAN : x[at];
    }
  });
  return found;
}

void top_of_rows(jaxgpt_model& model, int rows, int columns, const float* logits, const double* temperature, int k,
                 const Top& top) {
  const Kernels& kernels = *model.kernels;
  const int blocks = (columns + kBlock64 - 1) / kBlock64, pieces = (columns + kPiece - 1) / kPiece;
  const std::vector<float> block_max = block_maxima(model, rows, columns, logits);
  const auto row_of = [&](int row) { return logits + size_t(row) * size_t(columns); };
  std::vector<double> largest(static_cast<size_t>(rows)), sums(size_t(rows) * size_t(pieces));
  for (int row = 0; row < rows; row++) {
    const float* maxima = &block_max[size_t(row) * size_t(blocks)];
    top.finite[row] = std::none_of(maxima, maxima + blocks, [](float x) { return std::isnan(x); });
    if (top.finite[row]) largest[size_t(row)] = double(*std::max_element(maxima, maxima + blocks));
  }
  model.pool.run(rows * pieces, [&](int i) {
    const int row = i / pieces, first = i % pieces * kPiece;
    if (top.finite[row])
      sums[size_t(i)] = kernels.sum_exponentials(row_of(row) + first, std::min(kPiece, columns - first),
                                                 largest[size_t(row)], temperature[row]);
  });
  model.pool.run(rows, [&](int row) {
    if (!top.finite[row]) return;
    const float* x = row_of(row);
    const std::vector<int32_t> found = largest_columns(x, columns, &block_max[size_t(row) * size_t(blocks)], k);
    double total = 0;
    for (int piece = 0; piece < pieces; piece++) total += sums[size_t(row) * size_t(pieces) + size_t(piece)];
    top.total[row] = total;
    for (int i = 0; i < k; i++) {
      const size_t at = size_t(row) * size_t(k) + size_t(i);
      top.ids[at] = found[size_t(i)];
      top.scaled[at] = (double(x[found[size_t(i)]]) - largest[size_t(row)]) / temperature[row];
    }
  });
}
