// The bound of the head's screen is a bound, and no wider than it must be.
//
// By Cauchy-Schwarz a logit is furthest above its screened value where the input has the direction of what the screen
// leaves out of its row, lo - 7.5. Inputs are made so for each kind of row; the bound must hold there, and for every
// other output, and a tenth less would not.
#include <algorithm>

#include "checks.h"
#include "logits/head.h"

namespace {

constexpr int kInputs = 192, kOutputs = 64 * kTile + 5;  // enough tiles for a screen; the last one is not full
constexpr double kTight = 0.9;  // of the bound that aligned inputs reach: rounding them to 8 bits costs the rest

// Rows whose lo nibbles are of a kind: all the largest, all the smallest, in turns, one of its own, at random.
std::vector<int8_t> adversarial_rows() {
  auto weight = integers<int8_t>(size_t(kOutputs) * kInputs, -127, 127);
  for (int o = 0; o < kOutputs; o++)
    for (int i = 0; i < kInputs; i++) {
      int8_t& w = weight[size_t(o * kInputs + i)];
      const int hi = std::max(-7, (w + 128) / 16 - 8);  // -128 is no weight
      const int lo = (w + 128) % 16;
      const int wanted[] = {15, 0, i % 2 ? 15 : 0, i == o % kInputs ? 15 : 8, lo};
      w = int8_t(16 * hi + wanted[o % 5]);
    }
  return weight;
}

int lo_of(int8_t w) { return (w + 128) % 16; }

// A row in the direction of an output's lo - 7.5.
std::vector<float> aligned_with(const std::vector<int8_t>& weight, int output) {
  std::vector<float> x;
  for (int i = 0; i < kInputs; i++) x.push_back((float(lo_of(weight[size_t(output * kInputs + i)])) - 7.5f) / 7.5f);
  return x;
}

// s_w s_x (16 sum((hi - 8) x) + 7.5 sum(x)), from the integers of the row that was quantized.
double screened_value(const std::vector<int8_t>& weight, int output, float weight_scale, const InputRows& x,
                      bool two_level) {
  const int8_t* q = x.integers.as<int8_t>();
  double sum = 0;
  for (int i = 0; i < kInputs; i++) {
    const int8_t w = weight[size_t(output * kInputs + i)];
    const double value = q[i] + (two_level ? q[padded(kInputs) + i] / 256.0 : 0.0);
    sum += (w - lo_of(w) + 7.5) * value;
  }
  return double(weight_scale) * double(x.quants[0].scale) * sum;
}

struct Screened {
  Screened(const Kernels& k, bool two_level)
      : weight(adversarial_rows()), scale(size_t(kOutputs)), model(jaxgpt_shape{1, 1, kInputs, 1, kOutputs, 1, 0, 8}, &k, 2),
        head(model) {
    for (float& s : scale) s = 0.001f + 0.01f * float(generator() % 1000) / 1000;
    const jaxgpt_linear linear = {weight.data(), scale.data(), nullptr, nullptr, kOutputs, kInputs, 8, 0, two_level, 0};
    model.set_matrix(model.head, linear, kOutputs, kInputs, "lm_head", true);
    x.reserve(1, kInputs, kInputs);
  }
  void quantize(const std::vector<float>& row) {
    x.take(model, model.head, row.data(), kInputs, 1, nullptr);
  }

  std::vector<int8_t> weight;
  std::vector<float> scale;
  jaxgpt_model model;
  Head head;
  InputRows x;
};

void check_bound(const Kernels& k, bool two_level) {
  Screened of(k, two_level);
  std::vector<std::vector<float>> rows = {normals(kInputs), std::vector<float>(kInputs, -1.0f)};
  std::vector<int> aligned = {-1, -1};
  for (const int output : {0, 1, 2, 3, 4, 63, 64, 1234, kOutputs - 1}) {
    rows.push_back(aligned_with(of.weight, output));
    aligned.push_back(output);
  }
  std::vector<float> logits(kOutputs);
  for (size_t row = 0; row < rows.size(); row++) {
    of.quantize(rows[row]);
    of.head.predict(of.x, 1, logits.data(), nullptr);
    const std::vector<float>& upper = of.head.screen(of.x);
    for (int o = 0; o < kOutputs; o++) {
      const double value = screened_value(of.weight, o, of.scale[size_t(o)], of.x, two_level);
      const double error = double(logits[size_t(o)]) - value, bound = double(upper[size_t(o)]) - value;
      if (!(bound >= error)) differ(k, "screen: output %d is %g above its value, its bound %g", o, error, bound);
      if (o == aligned[row] && !(error >= kTight * bound))
        differ(k, "screen: output %d reaches %g of its bound %g", o, error, bound);
    }
    for (size_t o = kOutputs; o < upper.size(); o++)
      if (upper[o] != -INFINITY) differ(k, "screen: output %zu beyond the vocabulary has a bound", o);
  }
}

// An output that the screen rates below another, and that is the largest all the same, is found.
void check_hidden_largest(const Kernels& k) {
  Screened of(k, false);
  for (const int output : {0, 3, 4, 1234, kOutputs - 1}) {
    of.quantize(aligned_with(of.weight, output));
    std::vector<float> logits(kOutputs);
    of.head.predict(of.x, 1, logits.data(), nullptr);
    int32_t best = -1;
    of.head.use_screen(true);
    of.head.predict(of.x, 1, nullptr, &best);
    const auto largest = std::max_element(logits.begin(), logits.end());
    if (best != int32_t(largest - logits.begin()))
      differ(k, "screen: token %d is the best, expected %td", best, largest - logits.begin());
  }
}

}  // namespace

void check_screen(const Kernels& k) {
  check_bound(k, false);
  check_bound(k, true);
  check_hidden_largest(k);
}
