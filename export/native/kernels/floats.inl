// The float loops, written once over vectors as wide as an instruction set's registers; each instruction set includes
// this after it has defined
//   Floats, Ints, Doubles   vectors of one width, of GCC's and Clang's kind; Half, the bits of a float16
//   vmax, vmin              a > b ? a : b, a < b ? a : b, of Floats and of Doubles
//   mul_add                 a b + c of Doubles, rounded once or twice
//   load_doubles            kDoubles float, float16 or int8 at a place
//   load_floats             kFloats int32 at a place
//   store                   Doubles to float; Ints, in [-128, 127], to int8
//   store_element           one float to a float16
//   kAccumulators           how many Doubles registers hold as sums beside what is multiplied: 4, 8 or 16
// Compiled without contraction: what must round as model/arithmetic.py says is written with plain operators, what
// may fuse with mul_add().
//
// What lies between two matrices (norms, attention, GELU) is computed in doubles and rounded to float once, so that
// every instruction set and PyTorch, which does the same, round to the same integers afterwards.
//
// Included in an anonymous namespace; needs <math.h>, <string.h>, <stdint.h> and kernels.h.

constexpr int kFloats = sizeof(Floats) / sizeof(float), kDoubles = sizeof(Doubles) / sizeof(double);
static_assert(16 % kFloats == 0 && 16 % kDoubles == 0, "loops go over multiples of 16");

inline Floats splat(float x) { return Floats{} + x; }
inline Doubles splat(double x) { return Doubles{} + x; }
inline Floats load_floats(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline Doubles load_doubles(const double* p) {
  Doubles v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }
inline void store(double* p, Doubles v) { memcpy(p, &v, sizeof v); }

template <typename T>
inline T plus(T a, T b) {
  return a + b;
}
template <typename T>
inline T greater(T a, T b) {
  return a > b ? a : b;
}
// All lanes in one, halving.
template <typename T, int N, typename V>
inline T over_lanes(V v, T (*how)(T, T)) {
  T lanes[N];
  memcpy(lanes, &v, sizeof lanes);
  for (int n = N / 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) lanes[i] = how(lanes[i], lanes[i + n]);
  return lanes[0];
}
inline float sum_lanes(Floats v) { return over_lanes<float, kFloats>(v, plus); }
inline int32_t sum_lanes(Ints v) { return over_lanes<int32_t, kFloats>(v, plus); }
inline double sum_lanes(Doubles v) { return over_lanes<double, kDoubles>(v, plus); }
inline float max_lanes(Floats v) { return over_lanes<float, kFloats>(v, greater); }
inline double max_lanes(Doubles v) { return over_lanes<double, kDoubles>(v, greater); }

inline Floats magnitude(Floats a) { return (Floats)((Ints)a & 0x7fffffff); }

// Rounds halves to even, |x| < 2^22: adding 1.5 x 2^23 leaves no bits below 1.
inline Floats rounded(Floats x) {
  const Floats magic = splat(12582912.0f);
  return (x + magic) - magic;
}
// The same as integers.
inline Ints round_to_ints(Floats x) {
  const Floats magic = splat(12582912.0f);
  return (Ints)(x + magic) - 0x4b400000;
}

typedef int64_t Longs __attribute__((vector_size(sizeof(Doubles))));

constexpr double kInverseFactorial[] = {1.0,          1.0,           1.0 / 2,       1.0 / 6,
                                        1.0 / 24,     1.0 / 120,     1.0 / 720,     1.0 / 5040,
                                        1.0 / 40320,  1.0 / 362880,  1.0 / 3628800, 1.0 / 39916800};

// e^x within some units in the last place for x in [-700, 700]; what lies beyond counts as its end, NaN stays NaN.
inline Doubles exponential(Doubles x) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 x 2^52: adding it leaves no bits below 1
  x = vmin(splat(700.0), vmax(splat(-700.0), x));  // of NaN and a number they give the second
  const Doubles shifted = mul_add(x, splat(1.4426950408889634), splat(kMagic)), n = shifted - kMagic;
  Doubles r = mul_add(n, splat(-0.693147180369123816490), x);
  r = mul_add(n, splat(-1.90821492927058770002e-10), r);
  Doubles p = splat(1.0 / 479001600);  // Taylor: |r| <= ln 2 / 2
  for (int k = 12; k > 0; k--) p = mul_add(p, r, splat(kInverseFactorial[k - 1]));
  const Longs power = ((Longs)shifted + (1023 - 0x4338000000000000)) << 52;
  return p * (Doubles)power;
}

void layer_norm(const float* x, const float* gain, const float* bias, int n, float* y) {
  const int whole = n / kDoubles * kDoubles;
  Doubles total = {};
  for (int i = 0; i < whole; i += kDoubles) total += load_doubles(x + i);
  double sum = sum_lanes(total);
  for (int i = whole; i < n; i++) sum += x[i];
  const double mean = sum / n;
  Doubles squares = {};
  for (int i = 0; i < whole; i += kDoubles) {
    const Doubles d = load_doubles(x + i) - mean;
    squares = mul_add(d, d, squares);
  }
  double square = sum_lanes(squares);
  for (int i = whole; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
  const double rate = 1.0 / sqrt(square / n + 1e-5);
  for (int i = 0; i < whole; i += kDoubles)
    store(y + i, mul_add((load_doubles(x + i) - mean) * rate, load_doubles(gain + i), load_doubles(bias + i)));
  for (int i = whole; i < n; i++) y[i] = float((x[i] - mean) * rate * gain[i] + bias[i]);
}

// Floats of a row from i on, divided by smooth, zeros beyond n.
inline Floats smoothed(const float* x, const float* smooth, int i, int n) {
  Floats v = {};
  if (i + kFloats <= n) {
    v = load_floats(x + i);
    return smooth ? v / load_floats(smooth + i) : v;
  }
  for (int j = 0; i + j < n; j++) v[j] = smooth ? x[i + j] / smooth[i + j] : x[i + j];
  return v;
}

inline Ints store_bytes(int8_t* q, Floats v) {
  Ints whole = round_to_ints(v);
  store(q, whole);
  return whole;
}

void quantize(const float* x, const float* smooth, int n, float static_scale, int8_t* q, int8_t* residual,
              RowQuant* row) {
  const int width = padded(n);
  float scale = static_scale;
  if (scale == 0) {
    Floats top = {};
    for (int i = 0; i < n; i += kFloats) top = vmax(top, magnitude(smoothed(x, smooth, i, n)));
    scale = max_lanes(top) / 127.0f;
    scale = scale > 1.17549435e-38f ? scale : 1.17549435e-38f;
  }
  Ints total = {}, residual_total = {};
  for (int i = 0; i < width; i += kFloats) {
    const Floats v = smoothed(x, smooth, i, n);
    Floats whole = rounded(vmax(vmin(v / scale, splat(4e6f)), splat(-4e6f)));
    whole = vmax(vmin(whole, splat(127.0f)), splat(-127.0f));
    total += store_bytes(q + i, whole);
    if (residual) {
      Floats rest = (v - whole * scale) / scale * 256.0f;
      rest = vmax(vmin(rest, splat(127.0f)), splat(-127.0f));  // 127.4 rounds to 127: clipping first is the same
      residual_total += store_bytes(residual + i, rounded(rest));
    }
  }
  row->scale = scale;
  row->start = -128 * sum_lanes(total);
  row->residual_start = -128 * sum_lanes(residual_total);
}

void sum_groups(const int8_t* q, const int8_t* residual, int n, int group, int32_t* sums) {
  for (int g = 0; g * group < n; g++) {
    int32_t whole = 0, rest = 0;
    for (int i = g * group; i < (g + 1) * group && i < n; i++) whole += q[i], rest += residual[i];
    sums[g] = 8 * (256 * whole + rest);
  }
}

// GELU (tanh): 0.5 x (1 + tanh u) = x / (1 + e^(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
void gelu(float* x, int n) {
  for (int i = 0; i < n; i += kDoubles) {
    const Doubles v = load_doubles(x + i);
    const Doubles u = mul_add(v * v * v, splat(0.044715), v) * 0.79788456080286535588;
    store(x + i, v / (1.0 + exponential(-2.0 * u)));
  }
}

void dequantize8(const int32_t* sums, const int32_t* residual_sums, float scale, const float* weight_scale,
             const float* bias, float* y) {
  for (int o = 0; o < kTile; o += kFloats) {
    Floats s = load_floats(sums + o);
    if (residual_sums) s = load_floats(residual_sums + o) / 256.0f + s;
    const Floats out = s * (scale * load_floats(weight_scale + o));
    store(y + o, bias ? out + load_floats(bias + o) : out);
  }
}

void dequantize4(const float* sums, float scale, const float* bias, float* y) {
  for (int o = 0; o < kTile; o += kFloats) {
    const Floats out = load_floats(sums + o) * (scale / 256.0f);
    store(y + o, bias ? out + load_floats(bias + o) : out);
  }
}

void add(const float* x, int n, float* y) {
  for (int i = 0; i < n; i += kFloats) store(y + i, load_floats(y + i) + load_floats(x + i));
}

void fold_max(const float* y, float* lanes) {
  for (int i = 0; i < 16; i += kFloats) {
    const Floats a = load_floats(y + i), b = load_floats(y + i + 16), c = load_floats(y + i + 32), d = load_floats(y + i + 48);
    const Floats nothing = (a - a) + (b - b) + (c - c) + (d - d);
    store(lanes + i, vmax(vmax(a, b), vmax(c, d)) + nothing);
  }
}

int argmax(const float* x, int n) {
  Floats best = splat(x[0]), nothing = {};  // x - x is 0 where x is finite, else NaN
  for (int i = 0; i < n; i += kFloats) {
    Floats v = splat(x[i]);
    if (i + kFloats <= n)
      v = load_floats(x + i);
    else
      for (int j = 0; i + j < n; j++) v[j] = x[i + j];
    best = vmax(v, best);
    nothing += v - v;
  }
  if (sum_lanes(nothing) != 0) return -1;
  const float top = max_lanes(best);
  int at = 0;
  while (x[at] != top) at++;
  return at;
}

void screen_bounds(const float* coarse, float rate, float middle, float length, const float* scale, const float* error,
            float* upper) {
  for (int o = 0; o < kTile; o += kFloats) {
    const Floats value = (load_floats(coarse + o) * rate + middle) * load_floats(scale + o);
    store(upper + o, value + load_floats(error + o) * length);
  }
}

float max(const float* x, int n) {
  Floats found = load_floats(x);
  for (int i = kFloats; i < n; i += kFloats) found = vmax(found, load_floats(x + i));
  return max_lanes(found);
}

// ---- attention

// One element of a cache of float32, float16 or int8 with a scale.
inline void store_element(float* p, float x) { *p = x; }
inline void store_element(int8_t* p, float x) { *p = (int8_t)lrintf(x); }

inline float kv_scale(const float* x, int D) {
  float top = 0;
  for (int d = 0; d < D; d++) top = fabsf(x[d]) > top ? fabsf(x[d]) : top;
  return top > 0 ? top / 127.0f : 1.0f;
}

// Where things of a position lie.
template <typename T>
inline T* keys_of(const HeadCache* cache, int Dp, int position) {
  return (T*)(cache->keys + position / kBlock * cache->stride) + position % kBlock / 16 * Dp * 16;
}
template <typename T>
inline T* value_of(const HeadCache* cache, int Dp, int position) {
  return (T*)(cache->values + position / kBlock * cache->stride) + position % kBlock * Dp;
}
inline float* scale_at(uint8_t* scale, const HeadCache* cache, int position) {
  return (float*)(scale + position / kBlock * cache->stride) + position % kBlock;
}

template <typename T>
void store_kv_as(const HeadCache* cache, int D, int position, const float* key, const float* value) {
  const int Dp = (D + 15) / 16 * 16;
  T* keys = keys_of<T>(cache, Dp, position) + position % 16;
  T* values = value_of<T>(cache, Dp, position);
  // A position's key touches a line for every two channels: prefetch all of them before the first is written.
  for (int d = 0; d < D; d += 2) __builtin_prefetch(keys + d * 16, 1);
  float key_scale = 1, value_scale = 1;
  if (sizeof(T) == 1) {
    *scale_at(cache->key_scale, cache, position) = key_scale = kv_scale(key, D);
    *scale_at(cache->value_scale, cache, position) = value_scale = kv_scale(value, D);
  }
  for (int d = 0; d < D; d++) store_element(keys + d * 16, sizeof(T) == 1 ? key[d] / key_scale : key[d]);
  for (int d = 0; d < D; d++) store_element(values + d, sizeof(T) == 1 ? value[d] / value_scale : value[d]);
}

void store_kv(const HeadCache* cache, int kv, int D, int position, const float* key, const float* value) {
  if (kv == 0) store_kv_as<float>(cache, D, position, key, value);
  if (kv == 1) store_kv_as<Half>(cache, D, position, key, value);
  if (kv == 2) store_kv_as<int8_t>(cache, D, position, key, value);
}

template <typename T>
constexpr int kOfLine = 64 / (kDoubles * int(sizeof(T)));  // vectors in a line of the cache

template <typename T>
INLINED void prefetch_next(const HeadCache* cache, const T* place, int vector) {
  if (cache->next_offset && vector % kOfLine<T> == 0) __builtin_prefetch((const uint8_t*)place + cache->next_offset);
}

// scores[r][t] of B vectors of positions from `first` on, all in one block.
template <typename T, int R, int B>
inline void score_positions(const HeadCache* cache, int Dp, int first, const double* query, double* scores,
                            int width) {
  const T* keys[B];
  UNROLLED for (int j = 0; j < B; j++) keys[j] = keys_of<T>(cache, Dp, first + kDoubles * j) + (first + kDoubles * j) % 16;
  Doubles s[R][B] = {};
  for (int d = 0; d < Dp; d++)
    UNROLLED for (int j = 0; j < B; j++) {
      const T* place = keys[j] + d * 16;
      prefetch_next(cache, place, (d * 16 + (first + kDoubles * j) % 16) / kDoubles);
      const Doubles k = load_doubles(place);
      UNROLLED for (int r = 0; r < R; r++) s[r][j] = mul_add(k, splat(query[r * Dp + d]), s[r][j]);
    }
  UNROLLED for (int r = 0; r < R; r++)
    UNROLLED for (int j = 0; j < B; j++) {
      const int t = first + j * kDoubles;
      if (sizeof(T) == 1) s[r][j] *= load_doubles(scale_at(cache->key_scale, cache, t));
      store(scores + size_t(r) * width + t, s[r][j]);
    }
}

// Makes scores of positions 0 to last into probabilities; zeros beyond, up to width. Returns 1 / their sum, which
// is left to the end.
inline double softmax(double* scores, int last, int width) {
  for (int t = last + 1; t < width; t++) scores[t] = -1e300;
  Doubles highest = splat(-1e300), total = {};
  for (int t = 0; t < width; t += kDoubles) highest = vmax(highest, load_doubles(scores + t));
  const double top = max_lanes(highest);
  for (int t = 0; t < width; t += kDoubles) {
    const Doubles p = exponential(load_doubles(scores + t) - top);
    store(scores + t, p);
    total += p;
  }
  for (int t = last + 1; t < width; t++) total[t % kDoubles] -= scores[t], scores[t] = 0;
  return 1.0 / sum_lanes(total);
}

// mixed[r][d..] of V vectors of channels
template <typename T, int R, int V>
inline void mix_values(const HeadCache* cache, int Dp, int D, int d, int last, const double* scores, int width,
                       const double* rate, float* mixed, ptrdiff_t stride) {
  Doubles m[R][V] = {};
  for (int block = 0; block <= last; block += kBlock) {
    const T* values = value_of<T>(cache, Dp, block) + d;
    const int end = last + 1 - block < kBlock ? last + 1 - block : kBlock;
    for (int t = 0; t < end; t++)
      UNROLLED for (int v = 0; v < V; v++) {
        const T* place = values + size_t(t) * Dp + v * kDoubles;
        prefetch_next(cache, place, d / kDoubles + v);
        const Doubles x = load_doubles(place);
        UNROLLED for (int r = 0; r < R; r++) m[r][v] = mul_add(x, splat(scores[size_t(r) * width + block + t]), m[r][v]);
      }
  }
  UNROLLED for (int r = 0; r < R; r++)
    UNROLLED for (int v = 0; v < V; v++) {
      float y[kDoubles];
      store(y, m[r][v] * rate[r]);
      const int at = d + v * kDoubles;
      for (int i = 0; i < kDoubles && at + i < D; i++) mixed[r * stride + at + i] = y[i];
    }
}

template <typename T, int R>
void attend_rows(const HeadCache* cache, int D, int first, const double* query, double* scores, float* mixed,
                 ptrdiff_t stride) {
  const int Dp = (D + 15) / 16 * 16, last = first + R - 1, width = (last / 16 + 1) * 16;
  constexpr int B = kAccumulators / R < 8 ? kAccumulators / R : 8;  // vectors side by side: 1, 2, 4 or 8 divide a block
  constexpr int kWide = B * kDoubles;
  int t = 0;
  for (; t + kWide <= width; t += kWide) score_positions<T, R, B>(cache, Dp, t, query, scores, width);
  for (; t < width; t += kDoubles) score_positions<T, R, 1>(cache, Dp, t, query, scores, width);
  double rate[R];
  for (int r = 0; r < R; r++) {
    double* row = scores + size_t(r) * width;
    rate[r] = softmax(row, first + r, width);
    if (sizeof(T) == 1)
      for (int t = 0; t < width; t += kDoubles)
        store(row + t, load_doubles(row + t) * load_doubles(scale_at(cache->value_scale, cache, t)));
  }
  int d = 0;
  for (; d + kWide <= Dp; d += kWide)
    mix_values<T, R, B>(cache, Dp, D, d, last, scores, width, rate, mixed, stride);
  for (; d < Dp; d += kDoubles) mix_values<T, R, 1>(cache, Dp, D, d, last, scores, width, rate, mixed, stride);
}

template <typename T>
void attend_as(const HeadCache* cache, int D, int first, int rows, const double* query, double* scores, float* mixed,
               ptrdiff_t stride) {
  const int Dp = (D + 15) / 16 * 16;
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    attend_rows<T, 4>(cache, D, first + r, query + r * Dp, scores, mixed + r * stride, stride);
  for (; r < rows; r++)
    attend_rows<T, 1>(cache, D, first + r, query + r * Dp, scores, mixed + r * stride, stride);
}

void attend(const HeadCache* cache, int kv, int D, int first, int rows, const double* query, double* scores,
            float* mixed, ptrdiff_t stride) {
  if (kv == 0) attend_as<float>(cache, D, first, rows, query, scores, mixed, stride);
  if (kv == 1) attend_as<Half>(cache, D, first, rows, query, scores, mixed, stride);
  if (kv == 2) attend_as<int8_t>(cache, D, first, rows, query, scores, mixed, stride);
}

void merge_planes(const uint8_t* hi, const uint8_t* lo, int inputs, int first, int outputs, uint8_t* tile) {
  const int from = 4 * first, to = 4 * (first + outputs);
  for (int k = 0; k < inputs; k += 8, hi += kSliceBytes, lo += kSliceBytes, tile += 2 * kSliceBytes)
    for (int i = from; i < to; i++) {
      const uint8_t high = hi[i], low = lo[i];
      tile[i] = uint8_t(high << 4 | (low & 15));
      tile[kSliceBytes + i] = uint8_t((high & 0xf0) | low >> 4);
    }
}

void prefetch_cache(const HeadCache* cache, int kv, int D, int positions, int part, int parts) {
  const size_t element = kv == 0 ? 4 : kv == 1 ? 2 : 1, of_position = (D + 15) / 16 * 16 * element;
  const size_t of_block = kBlock * of_position / 64;  // lines of 64 bytes
  const size_t values = (positions * of_position + 63) / 64, keys = (positions + 15) / 16 * 16 * of_position / 64;
  for (size_t line = keys * part / parts; line < keys * (part + 1) / parts; line++) {
    const size_t at = line / of_block * cache->stride + line % of_block * 64;
    __builtin_prefetch(cache->keys + at, 0, 2);
    if (line < values) __builtin_prefetch(cache->values + at, 0, 2);
  }
}

// A table with the functions of this file; what multiplies integers is added to it.
Kernels float_kernels(const char* name) {
  Kernels k;
  k.name = name;
  k.merge_planes = merge_planes;
  k.layer_norm = layer_norm;
  k.quantize = quantize;
  k.sum_groups = sum_groups;
  k.gelu = gelu;
  k.dequantize8 = dequantize8;
  k.dequantize4 = dequantize4;
  k.add = add;
  k.store_kv = store_kv;
  k.attend = attend;
  k.prefetch_cache = prefetch_cache;
  k.fold_max = fold_max;
  k.argmax = argmax;
  k.screen_bounds = screen_bounds;
  k.max = max;
  return k;
}
