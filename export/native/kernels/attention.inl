// Attention of one head over its keys and values, written once over vectors as wide as an instruction set's registers;
// included after floats.inl, whose names it uses, in the same anonymous namespace.

// One element of a cache of float32, float16 or int8 with a scale.
inline void store_element(float* p, float x) { *p = x; }
inline void store_element(int8_t* p, float x) { *p = (int8_t)lrintf(x); }

// The largest |x|, NaN where there is one: as integers, sizes lie in the order of floats, and NaN above them.
inline float largest(const float* x, int n) {
  int32_t top = 0;
  for (int i = 0; i < n; i++) {
    int32_t size;
    memcpy(&size, x + i, sizeof size);
    size &= 0x7fffffff;
    top = size > top ? size : top;
  }
  float found;
  memcpy(&found, &top, sizeof found);
  return found;
}

// NaN where a key or value is: integers hide it, the scale tells it on.
inline float kv_scale(const float* x, int D) {
  const float top = largest(x, D);
  return top == 0 ? 1.0f : top / 127.0f;
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

// R queries at a time from row r on, as long as their results are finite. Returns the first row that is left.
template <typename T, int R>
int attend_together(const HeadCache* cache, int D, int first, int r, int rows, const double* query, double* scores,
                    float* mixed, ptrdiff_t stride) {
  const int Dp = (D + 15) / 16 * 16;
  for (; r + R <= rows; r += R) {
    attend_rows<T, R>(cache, D, first + r, query + r * Dp, scores, mixed + r * stride, stride);
    // The first took the others' values with weight 0: NaN where one is not finite. Then each goes by itself.
    if (R > 1 && !(largest(mixed + r * stride, D) < INFINITY)) break;
  }
  return r;
}

template <typename T>
void attend_as(const HeadCache* cache, int D, int first, int rows, const double* query, double* scores, float* mixed,
               ptrdiff_t stride) {
  int r = attend_together<T, kQueries>(cache, D, first, 0, rows, query, scores, mixed, stride);
  r = attend_together<T, 4>(cache, D, first, r, rows, query, scores, mixed, stride);
  attend_together<T, 1>(cache, D, first, r, rows, query, scores, mixed, stride);
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
  k.dot_float32 = dot_float32;
  k.dot_float16 = dot_float16;
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
  k.exponentials = exponentials;
  k.sum_exponentials = sum_exponentials;
  return k;
}
