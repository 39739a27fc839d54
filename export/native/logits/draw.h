// Tokens drawn from rows of logits.
#pragma once

#include "model.h"

// See jaxgpt_draw in engine.h.
void draw_rows(jaxgpt_model& model, int rows, int columns, const float* logits, const jaxgpt_sampling* sampling,
               int32_t* tokens);
