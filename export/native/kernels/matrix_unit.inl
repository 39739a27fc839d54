// Products of many rows in the matrix unit (AMX), where the processor has one and the system lends it: 16 rows x 64
// bytes times 64 bytes x 16 outputs a product. Included by avx512.cpp in its anonymous namespace.

// Clang takes this instead of what holds for the file, so these functions have no vector instructions of their own.
#define MATRIX_UNIT __attribute__((target("amx-tile,amx-int8")))

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0-3 sums, 4-5 input rows, 6-7 weights; `second` is 0 where there are at most 16 rows.
MATRIX_UNIT void shape_tiles(int first, int second) {
  TileShapes shapes;
  for (int t = 0; t < 8; t++) {
    shapes.row_bytes[t] = 64;
    shapes.rows[t] = 16;
  }
  shapes.rows[0] = shapes.rows[1] = shapes.rows[4] = (uint8_t)first;
  shapes.rows[2] = shapes.rows[3] = shapes.rows[5] = (uint8_t)(second ? second : 1);
  _tile_loadconfig(&shapes);
}

// 32 outputs of up to 32 rows; sums hold the starts before.
MATRIX_UNIT void multiply_block(const uint8_t* half_tile, int inputs, const int8_t* x, ptrdiff_t stride, bool second,
                                int32_t* sums) {
  int32_t* lo = sums + 16 * kTile;
  _tile_loadd(0, sums, kTile * 4);
  _tile_loadd(1, sums + 16, kTile * 4);
  if (second) {
    _tile_loadd(2, lo, kTile * 4);
    _tile_loadd(3, lo + 16, kTile * 4);
  }
  for (int k = 0; k < inputs; k += 64) {
    const uint8_t* w = half_tile + size_t(k) / 4 * kSliceBytes;
    _tile_loadd(6, w, kSliceBytes);
    _tile_loadd(7, w + 64, kSliceBytes);
    _tile_loadd(4, x + k, stride);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    if (second) {
      _tile_loadd(5, x + 16 * stride + k, stride);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kTile * 4);
  _tile_stored(1, sums + 16, kTile * 4);
  if (second) {
    _tile_stored(2, lo, kTile * 4);
    _tile_stored(3, lo + 16, kTile * 4);
  }
}

MATRIX_UNIT void gemm(const uint8_t* tile, int inputs, const int8_t* x, ptrdiff_t stride, int rows,
                      const int32_t* start, int32_t* sums) {
  for (int r = 0; r < rows; r++)
    for (int o = 0; o < kTile; o++) sums[r * kTile + o] = start[r];
  int shaped = 0;
  for (int r = 0; r < rows; r += 32) {
    const int now = rows - r < 32 ? rows - r : 32, first = now < 16 ? now : 16;
    if (now != shaped) shape_tiles(first, now - first);
    shaped = now;
    for (int half = 0; half < 2; half++)
      multiply_block(tile + half * 128, inputs, x + r * stride, stride, now > first, sums + r * kTile + half * 32);
  }
  _tile_release();
}

bool has_matrix_unit() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  unsigned a = 7, b, c = 0, d;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  if (!(d >> 24 & 1) || !(d >> 25 & 1)) return false;  // amx-tile, amx-int8
  constexpr int kAskForState = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}
