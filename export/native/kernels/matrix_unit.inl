// Products of many rows in the matrix unit (AMX), where the processor has one and the system lends it: 16 rows x 64
// bytes times 64 bytes x 16 outputs a product. Included by avx512.cpp in its anonymous namespace.

// Clang takes this instead of what holds for the file.
#define MATRIX_UNIT \
  __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))

constexpr int kUnitInputs = 64;    // of a product
constexpr int kGemmMinRows = 16;   // rows that fill the matrix unit; 8 are multiplied sooner without it
constexpr int kGemm4MinRows = 32;  // the same of weights of 4 bits, which are made bytes before

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
  __asm__ volatile("" : "+m"(shapes));  // GCC 12 takes it that only its first 8 bytes are read
  _tile_loadconfig(&shapes);
}

// Before the unit reads what was just written: GCC does not know that it reads memory.
INLINED void written() { __asm__ volatile("" ::: "memory"); }

// 32 outputs of up to 32 rows; sums hold the starts before.
MATRIX_UNIT void multiply_block(const uint8_t* half_tile, int inputs, const int8_t* x, ptrdiff_t stride, bool second,
                                int32_t* sums) {
  int32_t* lo = sums + 16 * kTile;
  written();
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

// Adds to the sums.
MATRIX_UNIT void gemm_add(const uint8_t* tile, int inputs, const int8_t* x, ptrdiff_t stride, int rows, int32_t* sums) {
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

void gemm(const uint8_t* tile, int inputs, const int8_t* x, ptrdiff_t stride, int rows, const int32_t* start,
          int32_t* sums) {
  for (int r = 0; r < rows; r++)
    for (int o = 0; o < kTile; o++) sums[r * kTile + o] = start[r];
  gemm_add(tile, inputs, x, stride, rows, sums);
}

// ---- weights of 4 bits

// So many bytes of this thread, which begin at a page.
uint8_t* scratch(size_t bytes) {
  static thread_local Pages room;
  if (room.bytes() < bytes) room = Pages(bytes, false);
  return room.as<uint8_t>();
}

// The nibbles of a tile times their groups' factors, w = (nibble - 8) factor, as two tiles of bytes: w = 16 (hi - 128)
// + lo. Pairs of nibbles lie in 16 bits, where 2048 makes all of them positive.
void unpack_factors(const uint8_t* tile, const int8_t* factor, int inputs, int group, uint8_t* hi, uint8_t* lo) {
  const __m512i nibble = _mm512_set1_epi16(15), upper = _mm512_set1_epi16(int16_t(0xff00));
  for (int k = 0; k < inputs; factor += kTile) {
    __m512i f[4], offset[4];
    UNROLLED for (int v = 0; v < 4; v++) {
      const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(factor + v * 16)));
      f[v] = _mm512_or_si512(_mm512_and_si512(wide, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(wide, 16));
      offset[v] = _mm512_sub_epi16(_mm512_set1_epi16(2048), _mm512_slli_epi16(f[v], 3));
    }
    const int end = k + group < inputs ? k + group : inputs;
    for (; k < end; k += 8, tile += kSliceBytes)
      UNROLLED for (int v = 0; v < 4; v++) {
        const __m512i both = _mm512_loadu_si512(tile + v * 64);
        UNROLLED for (int four = 0; four < 2; four++) {
          const __m512i n = four ? _mm512_srli_epi16(both, 4) : both;
          const __m512i even = _mm512_add_epi16(_mm512_mullo_epi16(_mm512_and_si512(n, nibble), f[v]), offset[v]);
          const __m512i odd = _mm512_add_epi16(
              _mm512_mullo_epi16(_mm512_and_si512(_mm512_srli_epi16(n, 8), nibble), f[v]), offset[v]);
          const size_t at = size_t(k) / 4 * kSliceBytes + size_t(four) * kSliceBytes + size_t(v) * 64;
          const __m512i upper_odd = _mm512_and_si512(_mm512_slli_epi16(odd, 4), upper);
          _mm512_store_si512(hi + at, _mm512_or_si512(_mm512_srli_epi16(even, 4), upper_odd));
          const __m512i lower_odd = _mm512_slli_epi16(_mm512_and_si512(odd, nibble), 8);
          _mm512_store_si512(lo + at, _mm512_or_si512(_mm512_and_si512(even, nibble), lower_odd));
        }
      }
  }
}

// What dot4_factors computes.
void gemm4_factors(const uint8_t* tile, const int8_t* factor, int inputs, int group, const int8_t* x, ptrdiff_t stride,
                   int rows, const int32_t* group_sums, int32_t* sums) {
  const int groups = (inputs + group - 1) / group;
  uint8_t* hi = scratch(2 * size_t(kTile) * size_t(inputs));
  uint8_t* lo = hi + size_t(kTile) * size_t(inputs);
  unpack_factors(tile, factor, inputs, group, hi, lo);
  for (int r = 0; r < rows; r++) {
    int32_t eights = 0;  // 8 times the sum of the row
    for (int g = 0; g < groups; g++) eights += group_sums[r * groups + g];
    for (int o = 0; o < kTile; o++) sums[r * kTile + o] = -16 * eights;
  }
  gemm_add(hi, inputs, x, stride, rows, sums);
  // Of the most inputs 16 hi may pass what 32 bits hold; lo brings it back.
  for (int i = 0; i < rows * kTile; i++) sums[i] = int32_t(uint32_t(sums[i]) * 16);
  gemm_add(lo, inputs, x, stride, rows, sums);
}

// The nibbles of a tile as bytes.
void unpack_nibbles(const uint8_t* tile, int inputs, uint8_t* bytes) {
  const __m512i low = _mm512_set1_epi8(15);
  for (int k = 0; k < inputs; k += 8, tile += kSliceBytes, bytes += 2 * kSliceBytes)
    UNROLLED for (int v = 0; v < 4; v++) {
      const __m512i both = _mm512_loadu_si512(tile + v * 64);
      _mm512_store_si512(bytes + v * 64, _mm512_and_si512(both, low));
      _mm512_store_si512(bytes + kSliceBytes + v * 64, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
    }
}

// 32 outputs of up to 8 tokens, a pair of rows each. A group's sums go from the unit through memory.
MATRIX_UNIT void multiply_groups(const uint8_t* half_tile, const uint16_t* scale, int inputs, int group,
                                 const int8_t* x, ptrdiff_t stride, int tokens, const int32_t* group_sums,
                                 ptrdiff_t groups, float* sums) {
  constexpr int kTokens = 8;
  alignas(64) int32_t of_group[2][2 * kTokens][16] = {};
  __m512 total[kTokens][2];
  UNROLLED for (int m = 0; m < kTokens; m++) total[m][0] = total[m][1] = _mm512_setzero_ps();
  written();
  for (int g = 0, k = 0; k < inputs; g++) {
    const int end = k + group < inputs ? k + group : inputs;
    _tile_zero(0);
    _tile_zero(1);
    for (; k < end; k += kUnitInputs) {
      const uint8_t* w = half_tile + size_t(k) / 4 * kSliceBytes;
      _tile_loadd(6, w, kSliceBytes);
      _tile_loadd(7, w + 64, kSliceBytes);
      _tile_loadd(4, x + k, stride);
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
    }
    _tile_stored(0, of_group[0], 64);
    _tile_stored(1, of_group[1], 64);
    const __m512 scales[2] = {load_scales(scale + size_t(g) * kTile), load_scales(scale + size_t(g) * kTile + 16)};
    UNROLLED for (int m = 0; m < kTokens; m++) {
      const __m512i eights = _mm512_set1_epi32(group_sums[(m < tokens ? m : 0) * groups + g]);
      UNROLLED for (int v = 0; v < 2; v++) {
        const __m512i first = _mm512_load_si512(of_group[v][2 * m]), residual = _mm512_load_si512(of_group[v][2 * m + 1]);
        const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(first, 8), residual);
        total[m][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(both, eights)), scales[v], total[m][v]);
      }
    }
  }
  UNROLLED for (int m = 0; m < kTokens; m++)
    if (m < tokens)
      for (int v = 0; v < 2; v++) _mm512_storeu_ps(sums + m * kTile + v * 16, total[m][v]);
}

// What dot4 computes, to the last bit; groups are multiples of kUnitInputs.
MATRIX_UNIT void gemm4(const uint8_t* tile, const uint16_t* scale, int inputs, int group, const int8_t* x,
                       ptrdiff_t stride, int tokens, const int32_t* group_sums, float* sums) {
  const int groups = (inputs + group - 1) / group;
  uint8_t* bytes = scratch(size_t(kTile) * size_t(inputs));
  unpack_nibbles(tile, inputs, bytes);
  int shaped = 0;
  for (int m = 0; m < tokens; m += 8) {
    const int now = tokens - m < 8 ? tokens - m : 8;
    if (now != shaped) shape_tiles(2 * now, 0);
    shaped = now;
    for (int half = 0; half < 2; half++)
      multiply_groups(bytes + half * 128, scale + half * 32, inputs, group, x + 2 * m * stride, stride, now,
                      group_sums + m * groups, groups, sums + m * kTile + half * 32);
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
