// A token is drawn without sorting a row: its columns fall into buckets by how probable they are, whose sums say in which
// bucket the cumulative probability passes a number; only that bucket's columns are sorted.
#include "logits/draw.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "logits/top.h"

namespace {

constexpr int kBuckets = 2048;
constexpr double kBucketsPerUnit = 128;  // of (logit - largest) / temperature; what lies below -16 shares the last one
constexpr int kParts = 2;                // of a row whose columns are summed up each by itself

uint16_t bucket_of(double scaled) { return uint16_t(std::min(scaled * -kBucketsPerUnit, kBuckets - 1.0)); }

// A row whose columns lie in buckets.
struct Spread {
  const float *x, *block_max;
  int columns;
  double largest, temperature;
  std::vector<uint16_t> bucket;        // of each column
  std::vector<uint16_t> first_bucket;  // of each block of 64 columns
  std::vector<double> sums[kParts];    // of the weights in each bucket
  std::vector<int32_t> count[kParts];  // of columns
  std::vector<double> before;          // weights of all buckets before each one, and of all at the end
  std::vector<int32_t> count_before;

  void fill(const Kernels& kernels, int part) {
    double scaled[kBlock64], weight[kBlock64];
    double sum[kBuckets] = {};  // of this thread's stack: two threads share no line of it
    int32_t found[kBuckets] = {};
    const int blocks = int(first_bucket.size());
    for (int block = blocks * part / kParts; block < blocks * (part + 1) / kParts; block++) {
      const int c = block * kBlock64, n = std::min(kBlock64, columns - c);
      uint16_t* at = &bucket[size_t(c)];
      first_bucket[size_t(block)] = bucket_of((double(block_max[block]) - largest) / temperature);
      if (first_bucket[size_t(block)] == kBuckets - 1) {
        std::fill(at, at + n, uint16_t(kBuckets - 1));
        sum[kBuckets - 1] += kernels.sum_exponentials(x + c, n, largest, temperature);
        found[kBuckets - 1] += n;
        continue;
      }
      kernels.exponentials(x + c, n, largest, temperature, scaled, weight);
      for (int i = 0; i < n; i++) at[i] = bucket_of(scaled[i]);
      for (int i = 0; i < n; i++) {
        sum[at[i]] += weight[i];
        found[at[i]]++;
      }
    }
    sums[part].assign(sum, sum + kBuckets);
    count[part].assign(found, found + kBuckets);
  }

  void add_up() {
    before.assign(kBuckets + 1, 0);
    count_before.assign(kBuckets + 1, 0);
    for (size_t b = 0; b < kBuckets; b++) {
      before[b + 1] = before[b];
      count_before[b + 1] = count_before[b];
      for (int part = 0; part < kParts; part++) {
        before[b + 1] += sums[part][b];
        count_before[b + 1] += count[part][b];
      }
    }
  }
};

// Walks through the columns of a row, the most probable first, from a bucket on.
class Walk {
 public:
  Walk(const Spread& row, const Kernels& kernels, int bucket) : row_(row), kernels_(kernels), bucket_(bucket - 1) {}

  // Goes to the next column; false at the end.
  bool next() {
    while (at_ + 1 >= int(ids_.size())) {
      if (bucket_ + 1 >= kBuckets) return false;
      open(++bucket_);
    }
    reached_ += weights_[size_t(++at_)];
    return true;
  }
  int32_t id() const { return ids_[size_t(at_)]; }
  double weight() const { return weights_[size_t(at_)]; }
  double reached() const { return reached_; }  // the weights up to this column
  int bucket() const { return bucket_; }

 private:
  void open(int bucket) {
    at_ = -1;
    ids_.clear();
    if (row_.count_before[size_t(bucket)] == row_.count_before[size_t(bucket) + 1]) return;
    for (size_t block = 0; block < row_.first_bucket.size(); block++) {
      if (row_.first_bucket[block] > bucket) continue;
      const int begin = int(block) * kBlock64;
      for (int c = begin; c < std::min(begin + kBlock64, row_.columns); c++)
        if (row_.bucket[size_t(c)] == bucket) ids_.push_back(c);
    }
    const float* x = row_.x;
    std::sort(ids_.begin(), ids_.end(), [x](int32_t a, int32_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); });
    std::vector<float> logits;
    for (const int32_t id : ids_) logits.push_back(x[id]);
    weights_.resize(ids_.size());
    std::vector<double> scaled(ids_.size());
    kernels_.exponentials(logits.data(), int(logits.size()), row_.largest, row_.temperature, scaled.data(),
                          weights_.data());
    reached_ = row_.before[size_t(bucket)];
  }

  const Spread& row_;
  const Kernels& kernels_;
  std::vector<int32_t> ids_;
  std::vector<double> weights_;
  double reached_ = 0;
  int bucket_, at_ = -1;
};

int32_t draw_from(const Spread& row, const Kernels& kernels, const jaxgpt_sampling& sampling) {
  double total = row.before[kBuckets];  // of the columns that are kept, the last of which lies in bucket `last`
  int last = kBuckets - 1;
  const auto keep_up_to = [&](const Walk& walk) {
    total = walk.reached();
    last = walk.bucket();
  };
  // The first bucket whose end passes (or reaches) a weight, not behind the last one that is kept.
  const auto bucket_at = [&](double weight, bool passes) {
    const auto begin = row.before.begin() + 1, end = row.before.begin() + last + 1;
    return int((passes ? std::upper_bound(begin, end, weight) : std::lower_bound(begin, end, weight)) - begin);
  };
  if (sampling.top_k > 0 && sampling.top_k < row.columns) {
    const auto end = std::lower_bound(row.count_before.begin() + 1, row.count_before.end(), sampling.top_k);
    const int bucket = int(end - row.count_before.begin()) - 1;
    Walk walk(row, kernels, bucket);
    for (int k = row.count_before[size_t(bucket)]; k < sampling.top_k; k++) walk.next();
    keep_up_to(walk);
  }
  if (sampling.top_p < 1) {
    const double wanted = sampling.top_p * total;
    Walk walk(row, kernels, bucket_at(wanted, false));
    while (walk.next()) {
      keep_up_to(walk);
      if (walk.reached() >= wanted) break;
    }
  }
  if (sampling.min_p > 0) {
    const double below = std::min(std::log(sampling.min_p) * -kBucketsPerUnit, kBuckets - 1.0);
    const int bucket = std::max(0, int(below) - 1);  // where the first one that is not kept may lie
    Walk walk(row, kernels, bucket);
    double kept = row.before[size_t(bucket)];
    int at = std::max(0, bucket - 1);
    while (walk.next() && walk.weight() >= sampling.min_p) {
      kept = walk.reached();
      at = walk.bucket();
    }
    if (kept < total) {
      total = kept;
      last = at;
    }
  }
  // Below the total, which a product close to it rounds to: behind it lie columns that are not kept.
  const double wanted = std::min(sampling.uniform * total, std::nextafter(total, 0.0));
  Walk walk(row, kernels, bucket_at(wanted, true));
  int32_t token = 0;
  while (walk.next() && walk.bucket() <= last) {  // the columns of a bucket may add up to less than its sum
    token = walk.id();
    if (walk.reached() > wanted || walk.reached() >= total) break;
  }
  return token;
}

}  // namespace

void draw_rows(jaxgpt_model& model, int rows, int columns, const float* logits, const jaxgpt_sampling* sampling,
               int32_t* tokens) {
  const Kernels& kernels = *model.kernels;
  const int blocks = (columns + kBlock64 - 1) / kBlock64;
  const std::vector<float> block_max = block_maxima(model, rows, columns, logits);
  std::vector<Spread> spread(static_cast<size_t>(rows));
  const auto is_drawn = [&](int row) { return sampling[row].temperature > 0 && tokens[row] >= 0; };
  for (int row = 0; row < rows; row++) {
    const float *maxima = &block_max[size_t(row) * size_t(blocks)], *x = logits + size_t(row) * size_t(columns);
    if (std::any_of(maxima, maxima + blocks, [](float value) { return std::isnan(value); })) {
      tokens[row] = -1;
      continue;
    }
    const float* most = std::max_element(maxima, maxima + blocks);
    const float largest = *most;
    tokens[row] = int32_t(std::find(x + (most - maxima) * kBlock64, x + columns, largest) - x);
    if (!is_drawn(row)) continue;
    Spread& own = spread[size_t(row)];
    own.x = x;
    own.block_max = maxima;
    own.columns = columns;
    own.largest = double(largest);
    own.temperature = sampling[row].temperature;
    own.bucket.resize(size_t(columns));
    own.first_bucket.resize(size_t(blocks));
  }
  model.pool.run(rows * kParts, [&](int i) {
    if (is_drawn(i / kParts)) spread[size_t(i / kParts)].fill(kernels, i % kParts);
  });
  model.pool.run(rows, [&](int row) {
    if (!is_drawn(row)) return;
    spread[size_t(row)].add_up();
    tokens[row] = draw_from(spread[size_t(row)], kernels, sampling[row]);
  });
}
