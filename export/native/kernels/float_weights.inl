// Products with weights that stay floats, float32 or float16, written once over vectors; each instruction set
// includes this after floats.inl and defines before it
//   mul_add        a b + c of Floats, rounded once where the processor can
//   load_floats    kFloats float16 at a place
//   kSumVectors    vectors of a row's sums that are held side by side with those of kSumRows - 1 other rows
//
// An output's products are added one after the other, in the order of its inputs, whatever rows stand beside it: a
// row gives the same bits in a prompt, in a batch and alone.

constexpr int kSumRows = 6, kTileVectors = kTile / kFloats;
constexpr int kAloneVectors = kTileVectors < 8 ? kTileVectors : 8;  // of a row that is multiplied alone

// Adds to the sums of V vectors of outputs of R rows; `weights` begins with the first of these outputs.
template <int R, int V, typename Weight>
void dot_floats_block(const Weight* weights, int inputs, const float* x, ptrdiff_t stride, bool prefetch, float* sums) {
  Floats s[R][V];
  UNROLLED for (int r = 0; r < R; r++)
    UNROLLED for (int v = 0; v < V; v++) s[r][v] = load_floats(sums + r * kTile + v * kFloats);
  for (int k = 0; k < inputs; k++, weights += kTile) {
    if (prefetch) prefetch_weights<kTile * sizeof(Weight)>((const uint8_t*)weights);
    Floats w[V];
    UNROLLED for (int v = 0; v < V; v++) w[v] = load_floats(weights + v * kFloats);
    UNROLLED for (int r = 0; r < R; r++) {
      const Floats in = splat(x[r * stride + k]);
      UNROLLED for (int v = 0; v < V; v++) s[r][v] = mul_add(w[v], in, s[r][v]);
    }
  }
  UNROLLED for (int r = 0; r < R; r++)
    UNROLLED for (int v = 0; v < V; v++) store(sums + r * kTile + v * kFloats, s[r][v]);
}

// All outputs of R rows, as many at a time as registers hold.
template <int R, int V = kSumVectors, typename Weight>
void dot_floats_rows(const Weight* weights, int inputs, const float* x, ptrdiff_t stride, bool prefetch, float* sums) {
  for (int v = 0; v < kTileVectors; v += V)
    dot_floats_block<R, V>(weights + v * kFloats, inputs, x, stride, prefetch && v == 0, sums + v * kFloats);
}

// Weights are taken in pieces that stay in the first cache, unless one pass over all of them serves.
template <typename Weight>
void dot_floats(const Weight* weights, int inputs, const float* x, ptrdiff_t stride, int rows, const float* bias,
                float* sums) {
  constexpr int kPiece = 64;
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < kTile; v += kFloats) store(sums + r * kTile + v, bias ? load_floats(bias + v) : Floats{});
  const int vectors = rows == 1 ? kAloneVectors : kSumVectors;
  const int piece = rows <= kSumRows && vectors == kTileVectors ? inputs : kPiece;
  for (int k = 0; k < inputs; k += piece, weights += size_t(piece) * kTile) {
    const int n = inputs - k < piece ? inputs - k : piece;
    for (int r = 0; r < rows; r += kSumRows) {
      const float* in = x + r * stride + k;
      float* out = sums + r * kTile;
      const bool first = r == 0;
      switch (rows - r) {
        case 1: dot_floats_rows<1, kAloneVectors>(weights, n, in, stride, first, out); break;
        case 2: dot_floats_rows<2>(weights, n, in, stride, first, out); break;
        case 3: dot_floats_rows<3>(weights, n, in, stride, first, out); break;
        case 4: dot_floats_rows<4>(weights, n, in, stride, first, out); break;
        case 5: dot_floats_rows<5>(weights, n, in, stride, first, out); break;
        default: dot_floats_rows<kSumRows>(weights, n, in, stride, first, out);
      }
    }
  }
}

void dot_float32(const float* tile, int inputs, const float* x, ptrdiff_t stride, int rows, const float* bias,
                 float* sums) {
  dot_floats(tile, inputs, x, stride, rows, bias, sums);
}

void dot_float16(const uint16_t* tile, int inputs, const float* x, ptrdiff_t stride, int rows, const float* bias,
                 float* sums) {
  dot_floats((const Half*)tile, inputs, x, stride, rows, bias, sums);
}
