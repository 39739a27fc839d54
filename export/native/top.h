// Rows of logits reduced to what drawing a token needs: the largest, and the sum of all.
#pragma once

#include "model.h"

// See jaxgpt_top in engine.h.
struct Top {
  int32_t* ids;
  double* scaled;
  double* total;
  uint8_t* finite;
};

void top_of_rows(jaxgpt_model& model, int rows, int columns, const float* logits, const double* temperature, int k,
                 const Top& top);
