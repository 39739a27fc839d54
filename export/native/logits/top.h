// Rows of logits reduced to what scoring needs: the largest, and the sum of all.
#pragma once

#include <vector>

#include "model.h"

// See jaxgpt_top in engine.h.
struct Top {
  int32_t* ids;
  double* scaled;
  double* total;
  uint8_t* finite;
};

constexpr int kBlock64 = 64;  // columns with a maximum of their own

// The maximum of each block of 64 columns of each row; NaN where a logit of it is not finite.
std::vector<float> block_maxima(jaxgpt_model& model, int rows, int columns, const float* logits);

void top_of_rows(jaxgpt_model& model, int rows, int columns, const float* logits, const double* temperature, int k,
                 const Top& top);
