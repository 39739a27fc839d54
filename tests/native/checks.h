// What the checks of kernels share: random inputs, comparisons, the count of differences.
#pragma once

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <functional>
#include <random>
#include <string>
#include <vector>

#include "engine.h"
#include "kernels/kernels.h"

constexpr double kUlp = 1.0 / (1 << 23);
constexpr double kUlps = 4;  // a handful of roundings of each side; the most that was seen is between 1 and 2
constexpr double kNearest = 1e-4;  // rounded once: what a double may be off, beyond half a unit of the result's place
constexpr int kMostReported = 20;

inline int differences = 0;

__attribute__((format(printf, 2, 3))) inline void differ(const Kernels& k, const char* format, ...) {
  if (++differences > kMostReported) return;
  printf("%s: ", k.name);
  va_list arguments;
  va_start(arguments, format);
  vprintf(format, arguments);
  va_end(arguments);
  printf("\n");
}

// ---- random inputs

inline std::mt19937 generator(1);

template <typename T>
std::vector<T> integers(size_t n, int low, int high) {
  std::uniform_int_distribution<int> one(low, high);
  std::vector<T> all(n);
  for (T& x : all) x = T(one(generator));
  return all;
}

// Integers of which only the two outermost occur.
inline std::vector<int8_t> extremes(size_t n) {
  std::vector<int8_t> all = integers<int8_t>(n, 0, 1);
  for (int8_t& x : all) x = x ? 127 : -127;
  return all;
}

inline std::vector<float> normals(size_t n, float deviation = 1) {
  std::normal_distribution<float> one(0, deviation);
  std::vector<float> all(n);
  for (float& x : all) x = one(generator);
  return all;
}

// ---- comparisons

template <typename T>
void expect_same(const Kernels& k, const std::string& what, const std::vector<T>& got, const std::vector<T>& expected) {
  for (size_t i = 0; i < expected.size(); i++)
    if (memcmp(&got[i], &expected[i], sizeof(T)) != 0)
      return differ(k, "%s: element %zu is %.9g, expected %.9g", what.c_str(), i, double(got[i]), double(expected[i]));
}

// The float nearest to each expected double, or the other neighbour where it lies between two within kNearest;
// `slack` of an element is how far its doubles may be off beside that.
inline void expect_nearest(const Kernels& k, const std::string& what, const std::vector<float>& got,
                           const std::vector<double>& expected, const std::function<double(size_t)>& slack) {
  for (size_t i = 0; i < expected.size(); i++) {
    const double place = double(std::nextafter(fabsf(float(expected[i])), INFINITY)) - fabs(double(float(expected[i])));
    const double off = fabs(double(got[i]) - expected[i]);
    if (!(off <= (0.5 + kNearest) * place + slack(i)))
      return differ(k, "%s: element %zu is %.9g, expected the float nearest to %.17g", what.c_str(), i, double(got[i]),
                    expected[i]);
  }
}

// `size` of an element gives the number whose units in the last place count.
template <typename T>
void expect_near(const Kernels& k, const std::string& what, const std::vector<float>& got,
                 const std::vector<T>& expected, const std::function<double(size_t)>& size) {
  for (size_t i = 0; i < expected.size(); i++) {
    const double off = fabs(double(got[i]) - double(expected[i]));
    if (!(off <= kUlps * size(i) * kUlp))
      return differ(k, "%s: element %zu is %.9g, expected %.9g within %g ulp of %.3g", what.c_str(), i,
                    double(got[i]), double(expected[i]), kUlps, size(i));
  }
}

void check_all_products(const Kernels& k);  // check_products.cpp
void check_screen(const Kernels& k);        // check_screen.cpp
