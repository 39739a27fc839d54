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
//   kQueries                how many of a text attend together: a key or value is made doubles once for all of them
// Compiled without contraction: what must round as model/arithmetic.py says is written with plain operators, what
// may fuse with mul_add().
//
// What lies between two matrices (norms, attention, GELU) is computed in doubles and rounded to float once, so that
// every instruction set and PyTorch, which does the same, round to the same integers afterwards.
//
// Included in an anonymous namespace; needs <math.h>, <string.h>, <stdint.h> and kernels.h.

constexpr int kFloats = sizeof(Floats) / sizeof(float), kDoubles = sizeof(Doubles) / sizeof(double);
static_assert(16 % kFloats == 0 && 16 % kDoubles == 0, "loops go over multiples of 16");

// x - 0 is x, which compilers know; 0 + x is not where x is -0, and they add before each broadcast.
inline Floats splat(float x) { return x - Floats{}; }
inline Doubles splat(double x) { return x - Doubles{}; }
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
  Floats nothing = {};  // v - v is 0 where v is finite, else NaN
  for (int i = 0; i < width; i += kFloats) {
    const Floats v = smoothed(x, smooth, i, n);
    nothing += v - v;
    Floats whole = rounded(vmax(vmin(v / scale, splat(4e6f)), splat(-4e6f)));
    whole = vmax(vmin(whole, splat(127.0f)), splat(-127.0f));
    total += store_bytes(q + i, whole);
    if (residual) {
      Floats rest = (v - whole * scale) / scale * 256.0f;
      rest = vmax(vmin(rest, splat(127.0f)), splat(-127.0f));  // 127.4 rounds to 127: clipping first is the same
      residual_total += store_bytes(residual + i, rounded(rest));
    }
  }
  row->scale = scale + sum_lanes(nothing);  // integers hide what is not finite, so the scale tells it
  row->start = -128 * sum_lanes(total);
  row->residual_start = -128 * sum_lanes(residual_total);
}

void sum_groups(const int8_t* q, const int8_t* residual, int n, int group, int32_t* sums) {
  for (int g = 0; g * group < n; g++) {
    int32_t whole = 0, rest = 0;
    for (int i = g * group; i < (g + 1) * group && i < n; i++) whole += q[i], rest += residual ? residual[i] : 0;
    sums[g] = 8 * (residual ? 256 * whole + rest : whole);
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

// e^x for x <= 0 within 2 units in the last place, what lies below -700 as -700. No multiply-add fuses, so that every
// instruction set gives the same bits: what is drawn does not depend on the processor.
inline Doubles unfused_exponential(Doubles x) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 x 2^52: adding it leaves no bits below 1
  x = vmax(splat(-700.0), x);
  const Doubles shifted = x * 1.4426950408889634 + kMagic, n = shifted - kMagic;
  const Doubles r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;  // the first product is exact
  Doubles p = splat(1.0 / 6227020800);  // Taylor: |r| <= ln 2 / 2
  p = p * r + 1.0 / 479001600;
  for (int k = 12; k > 0; k--) p = p * r + kInverseFactorial[k - 1];
  const Longs power = ((Longs)shifted + (1023 - 0x4338000000000000)) << 52;
  return p * (Doubles)power;
}

void exponentials(const float* x, int n, double top, double temperature, double* scaled, double* weights) {
  const int whole = n / kDoubles * kDoubles;
  for (int i = 0; i < whole; i += kDoubles) {
    const Doubles value = (load_doubles(x + i) - top) / temperature;
    store(scaled + i, value);
    store(weights + i, unfused_exponential(value));
  }
  for (int i = whole; i < n; i++) {
    double one[kDoubles];
    scaled[i] = (double(x[i]) - top) / temperature;
    store(one, unfused_exponential(splat(scaled[i])));
    weights[i] = one[0];
  }
}

double sum_exponentials(const float* x, int n, double top, double temperature) {
  constexpr int kLanes = 16;
  Doubles sums[kLanes / kDoubles] = {};
  const int whole = n / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes)
    for (int v = 0; v < kLanes / kDoubles; v++)
      sums[v] += unfused_exponential((load_doubles(x + i + v * kDoubles) - top) / temperature);
  double lanes[kLanes];
  memcpy(lanes, sums, sizeof lanes);
  for (int i = whole; i < n; i++) {
    double one[kDoubles];
    store(one, unfused_exponential((splat(double(x[i])) - top) / temperature));
    lanes[i - whole] += one[0];
  }
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}
