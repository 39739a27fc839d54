// Compares the kernels of every instruction set that this machine and this build have with plain formulas and with
// the portable kernels; tests/test_export_native_kernels.py compiles it with the engine's sources and runs it.
//
// Integers, and floats that only plain operators make, must be identical. What is computed in doubles must be the
// float nearest to its formula. Where multiply-adds of floats may fuse, they may differ by kUlps units in the last place of the
// largest number that entered; each check says which that is.
// Prints a line for each difference and exits with 1, else prints the instruction sets that were checked.
#include <algorithm>
#include <cmath>

#include "checks.h"

namespace {

// ---- loops over floats

void check_layer_norm(const Kernels& k) {
  for (const int n : {1, 15, 16, 33, 768, 1600}) {
    auto x = normals(size_t(n), 3);
    for (float& one : x) one += 0.5f;
    const auto gain = normals(size_t(n)), bias = normals(size_t(n));
    double mean = 0, square = 0;
    for (const float one : x) mean += double(one) / n;
    for (const float one : x) square += (double(one) - mean) * (double(one) - mean) / n;
    std::vector<double> expected, sizes;
    for (size_t i = 0; i < x.size(); i++) {
      const double part = (double(x[i]) - mean) / sqrt(square + 1e-5) * double(gain[i]);
      expected.push_back(part + double(bias[i]));
      // A small result of larger terms has what their doubles were rounded by.
      sizes.push_back(1e-14 * (fabs(part) + fabs(double(bias[i])) + fabs(double(gain[i]))));
    }
    std::vector<float> y(x.size());
    k.layer_norm(x.data(), gain.data(), bias.data(), n, y.data());
    expect_nearest(k, "layer_norm of " + std::to_string(n), y, expected, [&](size_t i) { return sizes[i]; });
  }
}

// By the formula with tanh, which the kernels do not use: of two numbers near 1 its sum keeps what a long double holds.
void check_gelu(const Kernels& k) {
  std::vector<float> x;
  for (int i = -4096; i < 4096; i++) x.push_back(float(i) / 256);
  for (const float wide : {0.0f, 1e-38f, 1e-6f, 20.0f, 88.0f, 1e4f, 1e9f, 3.4e12f})
    for (const float sign : {1.0f, -1.0f}) x.push_back(sign * wide);
  std::vector<double> expected;
  for (const long double v : x) {
    const long double u = sqrtl(2 / 3.14159265358979323846L) * (v + 0.044715L * v * v * v);
    expected.push_back(double(0.5L * v * (1 + tanhl(u))));
  }
  auto y = x;
  k.gelu(y.data(), int(y.size()));
  expect_nearest(k, "gelu", y, expected,
                 [&](size_t i) { return 1e-14 * fabs(expected[i]) + 4e-19 * fabs(double(x[i])); });
}

struct Rounded {
  std::vector<int8_t> q, residual;
  RowQuant row = {};
};

Rounded quantized(const Kernels& k, const std::vector<float>& x, const float* smooth, float scale, bool two_level) {
  const size_t width = size_t(padded(int(x.size())));
  Rounded all = {std::vector<int8_t>(width, 99), std::vector<int8_t>(width, 99)};
  k.quantize(x.data(), smooth, int(x.size()), scale, all.q.data(), two_level ? all.residual.data() : nullptr, &all.row);
  return all;
}

// The formula of model/arithmetic.py, one number at a time.
Rounded rounded(const std::vector<float>& x, const float* smooth, float scale, bool two_level) {
  const size_t width = size_t(padded(int(x.size())));
  Rounded all = {std::vector<int8_t>(width, 0), std::vector<int8_t>(width, two_level ? 0 : 99)};
  std::vector<float> v = x;
  float most = 0;
  for (size_t i = 0; i < v.size(); i++) {
    if (smooth) v[i] /= smooth[i];
    most = std::max(most, fabsf(v[i]));
  }
  const float row_scale = scale != 0 ? scale : std::max(most / 127.0f, 1.17549435e-38f);
  const auto clipped = [](float y) { return std::min(127.0f, std::max(-127.0f, nearbyintf(y))); };
  int sum = 0, residual_sum = 0;
  for (size_t i = 0; i < v.size(); i++) {
    const float whole = clipped(v[i] / row_scale);
    const float product = whole * row_scale;
    all.q[i] = int8_t(whole);
    sum += all.q[i];
    if (!two_level) continue;
    all.residual[i] = int8_t(clipped((v[i] - product) / row_scale * 256.0f));
    residual_sum += all.residual[i];
  }
  all.row = {row_scale, -128 * sum, -128 * residual_sum};
  return all;
}

void check_quantize(const Kernels& k) {
  for (const int n : {1, 16, 47, 64, 769})
    for (const float magnitude : {0.0f, 1e-40f, 1e-30f, 1.0f, 1e30f})
      for (const float scale : {0.0f, 0.01f})
        for (const bool smoothed : {false, true})
          for (const bool two_level : {false, true}) {
            const auto x = normals(size_t(n), magnitude);
            auto smooth = normals(size_t(n));
            for (float& one : smooth) one = 0.5f + fabsf(one);
            const float* by = smoothed ? smooth.data() : nullptr;
            const Rounded got = quantized(k, x, by, scale, two_level), expected = rounded(x, by, scale, two_level);
            const std::string what = "quantize " + std::to_string(n) + " of about " + std::to_string(magnitude);
            expect_same(k, what, got.q, expected.q);
            expect_same(k, what + ", residual", got.residual, expected.residual);
            expect_same<float>(k, what + ", scale", {got.row.scale}, {expected.row.scale});
            expect_same<int32_t>(k, what + ", starts", {got.row.start, got.row.residual_start},
                                 {expected.row.start, expected.row.residual_start});
          }
}

// What consists of plain operators: the same bits as the portable kernels.
void check_plain_loops(const Kernels& k) {
  const Kernels& portable = *portable_kernels();
  const auto sums = integers<int32_t>(kTile, -2000000, 2000000), residual_sums = integers<int32_t>(kTile, -200000, 200000);
  const auto a = normals(kTile), b = normals(kTile), c = normals(kTile);
  const auto both = [&](const char* what, const std::function<void(const Kernels&, float*)>& run) {
    std::vector<float> got = c, expected = c;
    run(k, got.data());
    run(portable, expected.data());
    expect_same(k, what, got, expected);
  };
  for (const int32_t* residual : {static_cast<const int32_t*>(nullptr), residual_sums.data()})
    for (const float* bias : {static_cast<const float*>(nullptr), b.data()})
      both("dequantize8", [&](const Kernels& of, float* y) { of.dequantize8(sums.data(), residual, 0.3f, a.data(), bias, y); });
  for (const float* bias : {static_cast<const float*>(nullptr), b.data()})
    both("dequantize4", [&](const Kernels& of, float* y) { of.dequantize4(a.data(), 0.3f, bias, y); });
  both("add", [&](const Kernels& of, float* y) { of.add(a.data(), kTile, y); });
  both("screen_bounds",
       [&](const Kernels& of, float* y) { of.screen_bounds(a.data(), 0.3f, 0.2f, 5.0f, b.data(), a.data(), y); });
}

void check_argmax(const Kernels& k) {
  for (int n = 1; n <= 70; n++)
    for (int at = 0; at < n; at++) {
      auto x = normals(size_t(n));
      x[size_t(at)] = x[size_t(n - 1)] = 100;  // of equals the first
      if (k.argmax(x.data(), n) != at) differ(k, "argmax of %d is %d, expected %d", n, k.argmax(x.data(), n), at);
      if (n % 16 == 0 && k.max(x.data(), n) != 100) differ(k, "max of %d misses element %d", n, at);
      for (const float broken : {INFINITY, -INFINITY, NAN}) {
        x[size_t(at)] = broken;
        if (k.argmax(x.data(), n) != -1) differ(k, "argmax of %d overlooks %g at %d", n, double(broken), at);
      }
    }
}

// One exponential within 2 units in the last place, sums within what their terms may be off; and the portable bits.
void check_sum_exponentials(const Kernels& k) {
  const Kernels& portable = *find_kernels("portable");
  for (int i = 0; i < 20000; i++) {
    const float x = i < 700 ? float(-i) : -std::uniform_real_distribution<float>(0, i % 2 ? 2 : 60)(generator);
    const double temperature = i % 3 ? 1 : 0.7, scaled = (double(x) - 0.0) / temperature;
    if (scaled < -700) continue;
    const double got = k.sum_exponentials(&x, 1, 0, temperature);
    const long double expected = expl(static_cast<long double>(scaled));
    const double place = std::nextafter(double(expected), INFINITY) - double(expected);
    if (!(fabsl(got - expected) <= 2 * place)) differ(k, "exp(%.17g) is %.17g, expected %.17Lg", scaled, got, expected);
  }
  for (const int n : {1, 2, 15, 16, 17, 31, 300, 4096}) {
    const auto x = normals(size_t(n), 4);
    const double top = double(*std::max_element(x.begin(), x.end()));
    for (const double temperature : {0.1, 0.8, 1.0, 5.0, 5e-324, 1e300}) {
      const double got = k.sum_exponentials(x.data(), n, top, temperature);
      if (got != portable.sum_exponentials(x.data(), n, top, temperature))
        differ(k, "the sum of %d exponentials at %g is not the portable one", n, temperature);
      long double expected = 0;
      for (const float one : x) expected += expl(static_cast<long double>((double(one) - top) / temperature));
      if (!(fabsl(got - expected) <= 1e-15L * expected))
        differ(k, "the sum of %d exponentials at %g is %.17g, expected %.17Lg", n, temperature, got, expected);
    }
  }
}

void check_fold_max(const Kernels& k) {
  const auto x = normals(kTile);
  for (int at = 0; at < kTile; at++)
    for (const float odd : {100.0f, -100.0f, INFINITY, -INFINITY, NAN}) {
      auto y = x;
      y[size_t(at)] = odd;
      std::vector<float> lanes(16);
      k.fold_max(y.data(), lanes.data());
      for (int l = 0; l < 16; l++) {
        const float got = lanes[size_t(l)], *lane = &y[size_t(l)];
        const float most = std::max(std::max(lane[0], lane[16]), std::max(lane[32], lane[48]));
        const bool broken = l == at % 16 && !std::isfinite(odd);
        if (!(broken ? std::isnan(got) : got == most))
          differ(k, "fold_max: lane %d is %g with %g at %d", l, double(got), double(odd), at);
      }
    }
}

void check_read(const Kernels& k) {
  std::vector<uint8_t> bytes = integers<uint8_t>(512, 0, 255);
  const uint64_t before = k.read(bytes.data(), bytes.size());
  for (uint8_t& byte : bytes) {
    byte ^= 0x10;
    if (k.read(bytes.data(), bytes.size()) == before) differ(k, "read overlooks byte %td", &byte - bytes.data());
    byte ^= 0x10;
  }
}

// ---- attention

// One head's cache, laid out as a session lays out two heads.
struct Cache {
  Cache(int of_kv, int of_D, int positions) : kv(of_kv), D(of_D), Dp((of_D + 15) / 16 * 16) {
    const size_t part = size_t(kBlock * Dp) * (kv == 0 ? 4 : kv == 1 ? 2 : 1), scales = kv == 2 ? kBlock * 4 : 0;
    const size_t stride = 2 * 2 * (part + scales);
    bytes.assign(size_t((positions + kBlock - 1) / kBlock) * stride, 0);
    uint8_t* start = bytes.data();
    head = {start, start + part, start + 2 * part, start + 2 * part + scales, stride};
  }
  void store_kv(const Kernels& k, int position, const float* key, const float* value) {
    k.store_kv(&head, kv, D, position, key, value);
  }
  int kv, D, Dp;
  std::vector<uint8_t> bytes;
  HeadCache head;
};

// Every finite float16 comes back as it is, and floats between two of them are rounded as by the portable kernels.
void check_float16(const Kernels& k) {
  constexpr int D = 64;
  std::vector<float> halves;
  for (int bits = 0; bits < 0x7c00; bits++) {
    const int exponent = bits >> 10, mantissa = bits & 0x3ff;
    const float size = exponent ? ldexpf(float(1024 + mantissa), exponent - 25) : ldexpf(float(mantissa), -24);
    halves.push_back(size);
    halves.push_back(-size);
  }
  const std::vector<float> zeros(D, 0.0f);
  const std::vector<double> query(D, 0.0);
  std::vector<double> scores(kMaxQueries * kTile);
  std::vector<float> mixed(halves.size());
  for (size_t i = 0; i < halves.size(); i += D) {
    Cache cache(JAXGPT_KV_FP16, D, 1);
    cache.store_kv(k, 0, zeros.data(), &halves[i]);
    k.attend(&cache.head, cache.kv, D, 0, 1, query.data(), scores.data(), &mixed[i], D);
  }
  for (size_t i = 0; i < halves.size(); i++)
    if (mixed[i] != halves[i])
      return differ(k, "float16 %.9g comes back as %.9g", double(halves[i]), double(mixed[i]));

  std::vector<float> between;
  for (const float half : halves)
    for (const float off : {0.5f, 0.4999f, 0.5001f}) between.push_back(half + off * fabsf(half) / 1024);
  for (const float edge : {65519.0f, 65520.0f, 1e30f, 2.98023224e-8f, 2.9802326e-8f, 1e-40f, 0.0f, -0.0f})
    between.push_back(edge);
  between.resize(between.size() / D * D);
  for (size_t i = 0; i < between.size(); i += D) {
    Cache got(JAXGPT_KV_FP16, D, 1), expected(JAXGPT_KV_FP16, D, 1);
    got.store_kv(k, 0, &between[i], &between[i]);
    expected.store_kv(*portable_kernels(), 0, &between[i], &between[i]);
    expect_same(k, "floats as float16", got.bytes, expected.bytes);
  }
}

// Attention by its formula, over the keys and values that were put in.
std::vector<double> attended(const std::vector<float>& keys, const std::vector<float>& values, int D, int Dp,
                             int first, int rows, const std::vector<double>& query) {
  std::vector<double> mixed;
  for (int r = 0; r < rows; r++) {
    std::vector<double> sum(size_t(D), 0.0);
    double total = 0;
    for (int t = 0; t <= first + r; t++) {
      double score = 0;
      for (int d = 0; d < D; d++) score += query[size_t(r * Dp + d)] * double(keys[size_t(t * D + d)]);
      const double p = exp(score);
      total += p;
      for (int d = 0; d < D; d++) sum[size_t(d)] += p * double(values[size_t(t * D + d)]);
    }
    for (const double one : sum) mixed.push_back(one / total);
  }
  return mixed;
}

void check_attention(const Kernels& k, int kv, int D, int first, int rows) {
  const Kernels& portable = *portable_kernels();
  const int positions = first + rows + 3;  // texts that were cut leave some behind
  const std::string what = "attend (cache " + std::to_string(kv) + ", head size " + std::to_string(D) + ", " +
                           std::to_string(rows) + " rows from " + std::to_string(first) + ")";
  const auto keys = normals(size_t(positions * D)), values = normals(size_t(positions * D));
  Cache cache(kv, D, positions), expected_cache(kv, D, positions);
  for (int t = 0; t < positions; t++) {
    cache.store_kv(k, t, &keys[size_t(t * D)], &values[size_t(t * D)]);
    expected_cache.store_kv(portable, t, &keys[size_t(t * D)], &values[size_t(t * D)]);
  }
  expect_same(k, what + ", cache", cache.bytes, expected_cache.bytes);

  std::vector<double> query(size_t(rows * cache.Dp), 0.0);
  const auto numbers = normals(size_t(rows * D), 1 / sqrtf(float(D)));
  for (int r = 0; r < rows; r++) std::copy_n(&numbers[size_t(r * D)], D, &query[size_t(r * cache.Dp)]);
  const auto run = [&](const Kernels& of) {
    std::vector<double> scores(kMaxQueries * size_t(padded(first + rows)));
    std::vector<float> mixed(size_t(rows * D));
    of.attend(&cache.head, kv, D, first, rows, query.data(), scores.data(), mixed.data(), D);
    return mixed;
  };
  const auto mixed = run(k);
  // Values of size 1 are mixed in doubles; the portable kernels' result was rounded to a float.
  const auto slack = [](size_t) { return 1e-13; };
  const auto other = run(portable);
  const auto whole_unit = [&](size_t i) { return fabs(double(other[i])) * kUlp + slack(i); };
  expect_nearest(k, what + " beside portable", mixed, std::vector<double>(other.begin(), other.end()), whole_unit);
  if (kv == JAXGPT_KV_FP32)
    expect_nearest(k, what, mixed, attended(keys, values, D, cache.Dp, first, rows, query), slack);
  for (int part = 0; part < 3; part++) k.prefetch_cache(&cache.head, kv, D, positions, part, 3);
}

void check_attentions(const Kernels& k) {
  for (const int kv : {JAXGPT_KV_FP32, JAXGPT_KV_FP16, JAXGPT_KV_INT8})
    for (const int D : {1, 8, 16, 20, 64, 80, 100})
      for (const int first : {0, 15, 63, 64, 200})
        for (const int rows : {1, 4, 7}) check_attention(k, kv, D, first, rows);
}

}  // namespace

int main() {
  for (const Kernels* const* k = kernels_here(); *k; k++) {
    generator.seed(1);
    check_all_products(**k);
    check_screen(**k);
    check_layer_norm(**k);
    check_gelu(**k);
    check_quantize(**k);
    check_plain_loops(**k);
    check_argmax(**k);
    check_sum_exponentials(**k);
    check_fold_max(**k);
    check_read(**k);
    check_float16(**k);
    check_attentions(**k);
  }
  if (differences) {
    printf("%d differences\n", differences);
    return 1;
  }
  printf("%s\n", jaxgpt_instruction_sets());
  return 0;
}
