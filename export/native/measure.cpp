// What tests and benchmarks measure beside sessions: exact sums of one product, and read bandwidth.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "engine.h"
#include "model.h"
#include "runtime/errors.h"

int jaxgpt_sums(const char* isa, const int8_t* weight, int outputs, int inputs, const int8_t* x, int rows,
                int32_t* sums) {
  return guarded([&] {
    constexpr int kMax = 1 << 17;  // inputs whose sums 32 bits hold
    require_non_null(weight, x, sums);
    if (outputs < 1 || inputs < 1 || rows < 1 || outputs > kMax || inputs > kMax || rows > kMax)
      throw_error(JAXGPT_BAD_ARGUMENT, "a product of %d rows, %d inputs, %d outputs is none", rows, inputs, outputs);
    const Kernels* k = require_kernels(isa);
    jaxgpt_model model(jaxgpt_shape{1, 1, inputs, 1, outputs, 1, 0, 8}, k, 1);  // the matrix is its head
    Matrix matrix;
    const std::vector<float> ones(size_t(outputs), 1.0f);
    const jaxgpt_linear linear = {weight, ones.data(), nullptr, nullptr, nullptr, outputs, inputs, 8, 0, 0, 1.0f};
    model.set_matrix(matrix, linear, outputs, inputs, "matrix");
    const int width = padded(inputs);
    std::vector<int8_t> wide(size_t(rows) * size_t(width), 0);
    std::vector<int32_t> start(size_t(rows), 0), tile(size_t(rows) * kTile);
    for (int r = 0; r < rows; r++)
      for (int i = 0; i < inputs; i++) {
        wide[size_t(r) * size_t(width) + size_t(i)] = x[size_t(r) * size_t(inputs) + size_t(i)];
        start[size_t(r)] -= 128 * x[size_t(r) * size_t(inputs) + size_t(i)];
      }
    for (int t = 0; t < matrix.tiles(); t++) {
      k->dot8(matrix.weights(t), width, wide.data(), width, rows, start.data(), tile.data());
      for (int r = 0; r < rows; r++)
        for (int o = 0; o < std::min(kTile, outputs - t * kTile); o++)
          sums[size_t(r) * size_t(outputs) + size_t(t * kTile + o)] = tile[size_t(r * kTile + o)];
    }
  });
}

int jaxgpt_read_seconds(int64_t bytes, int threads, int passes, double* seconds) {
  return guarded([&] {
    constexpr size_t kPiece = size_t(1) << 16;
    require_non_null(seconds);
    if (bytes < int64_t(kPiece) || bytes > int64_t(1) << 46)
      throw_error(JAXGPT_BAD_ARGUMENT, "%lld bytes are too few or too many to read", static_cast<long long>(bytes));
    const Kernels* k = require_kernels(nullptr);
    Pool pool(threads);
    const size_t pieces = size_t(bytes) / kPiece;
    const Pages buffer(pieces * kPiece + 4096, true);
    memset(buffer.as<uint8_t>(), 1, buffer.bytes());
    std::vector<uint64_t> seen(pieces);
    for (int pass = 0; pass < passes; pass++) {
      const auto started = std::chrono::steady_clock::now();
      pool.run(int(pieces), [&](int piece) {
        seen[size_t(piece)] = k->read(buffer.as<uint8_t>() + size_t(piece) * kPiece, kPiece);
      });
      seconds[pass] = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
      uint64_t all = 0;
      for (const uint64_t one : seen) all ^= one;
      volatile uint64_t kept = all;
      (void)kept;
    }
  });
}
