// The largest of each row are found through the maxima of its blocks: the k-th largest of these is a bound that at least
// k logits reach and few others do.
#include "logits/top.h"

#include <algorithm>
#include <cmath>
#include <functional>

namespace {

constexpr int kPieceBlocks = 64;  // blocks of a piece that one thread takes
constexpr int kPiece = kBlock64 * kPieceBlocks;

// The k largest, the largest first, the lower of equals first.
std::vector<int32_t> largest_columns(const float* x, int columns, const float* block_max, int k) {
  const int blocks = (columns + kBlock64 - 1) / kBlock64;
  std::vector<float> maxima(block_max, block_max + blocks);
  float bound = -INFINITY;
  if (k < blocks) {
    std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), std::greater<float>());
    bound = maxima[size_t(k - 1)];
  }
  std::vector<int32_t> found;
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
