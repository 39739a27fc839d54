// float16 in plain C++, for the portable kernels: other processors have an instruction for them.

inline uint16_t f32_to_half(float x) {  // to nearest, halves to even
  uint32_t f;
  memcpy(&f, &x, 4);
  const uint32_t sign = f >> 16 & 0x8000;
  f &= 0x7fffffff;
  if (f >= 0x47800000) return (uint16_t)(sign | (f > 0x7f800000 ? 0x7e00 : 0x7c00));
  if (f < 0x38800000) {  // below the normal halves: let a float addition round
    float small;
    memcpy(&small, &f, 4);
    small += 0.5f;
    memcpy(&f, &small, 4);
    return (uint16_t)(sign | (f - 0x3f000000));
  }
  const uint32_t odd = f >> 13 & 1;
  return (uint16_t)(sign | ((f + 0xc8000fff + odd) >> 13));
}

inline float half_to_f32(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16;
  uint32_t f = uint32_t(h & 0x7fff) << 13;
  float x;
  if ((h & 0x7c00) == 0) {  // zero and what is below the normal halves
    x = float(h & 0x3ff) * 5.9604644775390625e-8f;
    memcpy(&f, &x, 4);
  } else {
    f += (h & 0x7c00) == 0x7c00 ? 0x70000000 : 0x38000000;
  }
  f |= sign;
  memcpy(&x, &f, 4);
  return x;
}
