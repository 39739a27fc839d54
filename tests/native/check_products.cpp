// Products of integers, of 8 bits, of nibble planes and of 4 bits: the same sums from every instruction set.
#include <algorithm>

#include "checks.h"

namespace {

std::vector<int32_t> naive_sums(const std::vector<int8_t>& weight, int outputs, int inputs,
                                const std::vector<int8_t>& x, int rows) {
  std::vector<int32_t> sums;
  for (int r = 0; r < rows; r++)
    for (int o = 0; o < outputs; o++) {
      int64_t sum = 0;
      for (int i = 0; i < inputs; i++) sum += int64_t(weight[size_t(o * inputs + i)]) * x[size_t(r * inputs + i)];
      sums.push_back(int32_t(sum));
    }
  return sums;
}

void check_sums(const Kernels& k) {
  constexpr int kRows = 40;
  const int shapes[][2] = {{1, 1}, {3, 7}, {16, 64}, {63, 65}, {64, 128}, {65, 100}, {130, 321}};
  for (const auto& shape : shapes)
    for (const bool extreme : {false, true}) {
      const int outputs = shape[0], inputs = shape[1];
      const size_t weights = size_t(outputs * inputs), numbers = size_t(kRows * inputs);
      const auto weight = extreme ? extremes(weights) : integers<int8_t>(weights, -127, 127);
      const auto x = extreme ? extremes(numbers) : integers<int8_t>(numbers, -127, 127);
      const auto expected = naive_sums(weight, outputs, inputs, x, kRows);
      for (int rows = 1; rows <= kRows; rows++) {
        std::vector<int32_t> sums(size_t(rows * outputs));
        if (jaxgpt_sums(k.name, weight.data(), outputs, inputs, x.data(), rows, sums.data()) != 0)
          return differ(k, "sums: %s", jaxgpt_error());
        expect_same(k, "sums (" + std::to_string(outputs) + ", " + std::to_string(inputs) + ") of " +
                           std::to_string(rows) + " rows",
                    sums, {expected.begin(), expected.begin() + ptrdiff_t(sums.size())});
      }
    }
}

using Product = void (*)(const uint8_t*, int, const int8_t*, ptrdiff_t, int, const int32_t*, int32_t*);

// The contract of one product: any bytes, starts and stride; outputs beyond `outputs` are left alone.
void check_product(const Kernels& k, const char* name, Product product, int first, int outputs) {
  constexpr int32_t kUntouched = 123456789;
  for (const int inputs : {64, 192})
    for (int rows = 1; rows <= 35; rows++) {
      const int stride = inputs + 64;
      const auto tile = integers<uint8_t>(size_t(inputs) * kTile, 0, 255);
      const auto x = integers<int8_t>(size_t(rows * stride), -127, 127);
      const auto start = integers<int32_t>(size_t(rows), -1000000, 1000000);
      std::vector<int32_t> sums(size_t(rows * kTile), kUntouched), expected = sums;
      for (int r = 0; r < rows; r++)
        for (int o = 0; o < outputs; o++) {
          int64_t sum = start[size_t(r)];
          for (int i = 0; i < inputs; i++)
            sum += int64_t(tile[size_t(i / 4 * kSliceBytes + (first + o) * 4 + i % 4)]) * x[size_t(r * stride + i)];
          expected[size_t(r * kTile + o)] = int32_t(sum);
        }
      product(tile.data() + first * 4, inputs, x.data(), stride, rows, start.data(), sums.data());
      expect_same(k, std::string(name) + " of " + std::to_string(rows) + " rows", sums, expected);
    }
}

void check_products(const Kernels& k) {
  check_product(k, "dot8", k.dot8, 0, kTile);
  for (int first = 0; first < kTile; first += 16) check_product(k, "column8", k.column8, first, 16);
}

// Nibble planes that are merged are the tile that they were made of, and multiply as it does.
void check_planes(const Kernels& k) {
  for (const int inputs : {64, 192}) {
    const auto tile = integers<uint8_t>(size_t(inputs) * kTile, 0, 255);
    std::vector<uint8_t> hi(tile.size() / 2), lo(hi.size());
    for (int i = 0; i < inputs; i++)
      for (int byte = 0; byte < 4; byte++)
        for (int o = 0; o < kTile; o++) {
          if (i % 4 != byte) continue;
          const uint8_t whole = tile[size_t(i / 4 * kSliceBytes + o * 4 + byte)];
          const size_t at = size_t(i / 8 * kSliceBytes + o * 4 + byte);
          const int shift = i % 8 < 4 ? 0 : 4;
          hi[at] = uint8_t(hi[at] | whole >> 4 << shift);
          lo[at] = uint8_t(lo[at] | (whole & 15) << shift);
        }
    for (const int first : {0, 16, 48}) {
      constexpr uint8_t kUntouched = 77;
      const int outputs = first ? 16 : kTile;
      std::vector<uint8_t> merged(tile.size(), kUntouched), expected = merged;
      k.merge_planes(hi.data(), lo.data(), inputs, first, outputs, merged.data());
      for (size_t at = 0; at < tile.size(); at++) {
        const int output = int(at % kSliceBytes) / 4;
        if (output >= first && output < first + outputs) expected[at] = tile[at];
      }
      expect_same(k, "merge_planes of " + std::to_string(outputs) + " from " + std::to_string(first), merged, expected);
    }
    for (int rows = 1; rows <= std::min(14, k.planes_max_rows); rows++) {
      const auto x = integers<int8_t>(size_t(rows * inputs), -127, 127);
      const auto start = integers<int32_t>(size_t(rows), -1000000, 1000000);
      std::vector<int32_t> sums(size_t(rows * kTile)), expected = sums;
      portable_kernels()->dot8(tile.data(), inputs, x.data(), inputs, rows, start.data(), expected.data());
      k.dot8_planes(hi.data(), lo.data(), inputs, x.data(), inputs, rows, start.data(), sums.data());
      expect_same(k, "dot8_planes of " + std::to_string(rows) + " rows", sums, expected);
    }
  }
}

float bfloat16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  memcpy(&x, &wide, 4);
  return x;
}

// Within ulps of the sum of the products' sizes, and the same bits whatever rows stand beside.
template <typename Weight, typename Product>
void check_float_product(const Kernels& k, const char* name, Product product, const std::vector<Weight>& tile,
                         const std::vector<float>& values, int inputs) {
  constexpr int kRows = 20;
  const int stride = inputs + 3;
  const auto x = normals(size_t(kRows * stride)), bias = normals(kTile);
  std::vector<float> all(kRows * kTile);
  product(tile.data(), inputs, x.data(), stride, kRows, bias.data(), all.data());
  std::vector<double> expected, sizes;
  for (int r = 0; r < kRows; r++)
    for (int o = 0; o < kTile; o++) {
      double sum = bias[size_t(o)], size = fabs(sum);
      for (int i = 0; i < inputs; i++) {
        const double one = double(values[size_t(i * kTile + o)]) * double(x[size_t(r * stride + i)]);
        sum += one;
        size += fabs(one);
      }
      expected.push_back(sum);
      sizes.push_back(size);
    }
  expect_near(k, name, all, expected, [&](size_t i) { return sizes[i]; });
  for (int rows = 1; rows <= kRows; rows++) {
    std::vector<float> some(size_t(rows * kTile));
    product(tile.data(), inputs, x.data(), stride, rows, bias.data(), some.data());
    expect_same(k, std::string(name) + " of " + std::to_string(rows) + " rows", some,
                {all.begin(), all.begin() + ptrdiff_t(some.size())});
  }
  const std::vector<float> zeros(kTile);
  std::vector<float> with_zeros(kTile), without(kTile);
  product(tile.data(), inputs, x.data(), stride, 1, zeros.data(), with_zeros.data());
  product(tile.data(), inputs, x.data(), stride, 1, nullptr, without.data());
  expect_same(k, std::string(name) + " without a bias", without, with_zeros);
}

void check_float_products(const Kernels& k) {
  for (const int inputs : {1, 63, 64, 65, 300}) {
    const auto floats = normals(size_t(inputs * kTile));
    check_float_product(k, "dot_float32", k.dot_float32, floats, floats, inputs);
    std::vector<uint16_t> halves;  // of either sign, subnormal ones among them
    std::vector<float> values;
    for (size_t i = 0; i < floats.size(); i++) {
      const int mantissa = int(generator() % 1024), exponent = int(generator() % 17);
      halves.push_back(uint16_t((generator() % 2) << 15 | unsigned(exponent) << 10 | unsigned(mantissa)));
      const float size = exponent ? ldexpf(float(1024 + mantissa), exponent - 25) : ldexpf(float(mantissa), -24);
      values.push_back(halves.back() >> 15 ? -size : size);
    }
    check_float_product(k, "dot_float16", k.dot_float16, halves, values, inputs);
  }
}

void check_dot4_factors(const Kernels& k) {
  const int shapes[][2] = {{64, 8}, {64, 32}, {192, 24}, {192, 128}, {1600, 32}, {2048, 2048}, {16640, 32}};
  for (const auto& shape : shapes)
    for (const int rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 31, 32, 33, 48, 65}) {
      const int inputs = shape[0], group = shape[1], groups = (inputs + group - 1) / group, stride = inputs + 64;
      if (inputs > 2048 && rows % 7 != 1 && rows % 32) continue;
      const bool extreme = rows % 8 == 0;
      const auto tile = integers<uint8_t>(size_t(inputs) * kTile / 2, 0, extreme ? 0 : 255);  // extreme: all -8
      const auto factor = integers<int8_t>(size_t(groups * kTile), extreme ? 127 : -127, 127);
      auto x = integers<int8_t>(size_t(rows * stride), -127, 127);
      if (extreme) std::fill(x.begin(), x.end(), int8_t(-127));
      std::vector<int32_t> group_sums(size_t(rows * groups)), sums(size_t(rows * kTile)), expected;
      for (int r = 0; r < rows; r++) {
        const int8_t* row = &x[size_t(r * stride)];
        k.sum_groups(row, nullptr, inputs, group, &group_sums[size_t(r * groups)]);
        for (int o = 0; o < kTile; o++) {
          int64_t total = 0;
          for (int i = 0; i < inputs; i++) {
            const int both = tile[size_t(i / 8 * kSliceBytes + o * 4 + i % 4)];
            total += ((i % 8 < 4 ? both & 15 : both >> 4) - 8) * row[i] * factor[size_t(i / group * kTile + o)];
          }
          expected.push_back(int32_t(total));
        }
      }
      k.dot4_factors(tile.data(), factor.data(), inputs, group, x.data(), stride, rows, group_sums.data(), sums.data());
      expect_same(k, "dot4_factors (" + std::to_string(inputs) + " in groups of " + std::to_string(group) + ") of " +
                         std::to_string(rows) + " rows", sums, expected);
    }
}

// Within ulps of the sum of what the groups contribute, regardless of sign.
void check_dot4(const Kernels& k) {
  const int shapes[][2] = {{64, 8}, {64, 64}, {192, 24}, {192, 64}, {192, 128}, {2048, 2048}, {4096, 4096}};
  for (const auto& shape : shapes)
    for (const int tokens : {1, 2, 3, 4, 5, 16, 17, 24, 35}) {
      const int inputs = shape[0], group = shape[1], groups = (inputs + group - 1) / group, stride = inputs + 64;
      const auto tile = integers<uint8_t>(size_t(inputs) * kTile / 2, 0, 255);
      const auto scale = integers<uint16_t>(size_t(groups * kTile), 0x3c00, 0x3f80);
      const size_t numbers = size_t(2 * tokens * stride);
      const auto x = tokens % 5 == 0 ? extremes(numbers) : integers<int8_t>(numbers, -127, 127);
      std::vector<int32_t> group_sums(size_t(tokens * groups));
      std::vector<double> expected, sizes;
      for (int m = 0; m < tokens; m++) {
        const int8_t* row = &x[size_t(2 * m * stride)];
        k.sum_groups(row, row + stride, inputs, group, &group_sums[size_t(m * groups)]);
        for (int o = 0; o < kTile; o++) {
          double total = 0, size = 0;
          for (int g = 0; g < groups; g++) {
            int64_t sum = 0;
            for (int i = g * group; i < std::min(inputs, (g + 1) * group); i++) {
              const int both = tile[size_t(i / 8 * kSliceBytes + o * 4 + i % 4)];
              sum += ((i % 8 < 4 ? both & 15 : both >> 4) - 8) * (256 * row[i] + row[stride + i]);
            }
            const double term = double(sum) * double(bfloat16(scale[size_t(g * kTile + o)]));
            total += term;
            size += fabs(term);
          }
          expected.push_back(total);
          sizes.push_back(size);
        }
      }
      std::vector<float> sums(size_t(tokens * kTile));
      k.dot4(tile.data(), scale.data(), tokens % 2 == 0, inputs, group, x.data(), stride, tokens, group_sums.data(), sums.data());
      expect_near(k, "dot4 (" + std::to_string(inputs) + " in groups of " + std::to_string(group) + ")", sums, expected,
                  [&](size_t i) { return sizes[i]; });
      // A text's tokens are the same bits alone and many at once.
      std::vector<float> alone(sums.size());
      for (int m = 0; m < tokens; m++)
        k.dot4(tile.data(), scale.data(), tokens % 2 == 0, inputs, group, &x[size_t(2 * m * stride)], stride, 1,
               &group_sums[size_t(m * groups)], &alone[size_t(m * kTile)]);
      expect_same(k, "dot4 of " + std::to_string(tokens) + " tokens at once", sums, alone);
    }
}

// The largest weights times the largest inputs, all of one sign: where sums of pairs are kept in 16 bits, they are full.
void check_fullest(const Kernels& k) {
  constexpr int kInputs = 192, kTokens = 3, kRows = 2 * kTokens, kMax = 127;
  const std::vector<uint8_t> ones(size_t(kInputs) * kTile, 0xff);
  const std::vector<uint16_t> scale(kTile, 0x3f80);  // 1
  for (const int8_t value : {int8_t(kMax), int8_t(-kMax)}) {
    const std::vector<int8_t> x(size_t(kRows * kInputs), value);
    const std::vector<int32_t> start(kRows, 0), eights(kTokens, 8 * 257 * value * kInputs);
    std::vector<int32_t> sums(size_t(kRows * kTile)), expected(sums.size(), 255 * value * kInputs);
    k.dot8(ones.data(), kInputs, x.data(), kInputs, kRows, start.data(), sums.data());
    expect_same(k, "dot8 of the largest", sums, expected);
    if (k.dot8_planes) {
      k.dot8_planes(ones.data(), ones.data(), kInputs, x.data(), kInputs, kRows, start.data(), sums.data());
      expect_same(k, "dot8_planes of the largest", sums, expected);
    }
    std::vector<float> floats(size_t(kTokens * kTile));
    const std::vector<float> all(floats.size(), float((15 - 8) * 257 * value * kInputs));
    k.dot4(ones.data(), scale.data(), true, kInputs, kInputs, x.data(), kInputs, kTokens, eights.data(), floats.data());
    expect_same(k, "dot4 of the largest", floats, all);
  }
}

}  // namespace

void check_all_products(const Kernels& k) {
  check_sums(k);
  check_products(k);
  check_planes(k);
  check_float_products(k);
  check_dot4_factors(k);
  check_dot4(k);
  check_fullest(k);
}
