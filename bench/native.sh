#!/usr/bin/env bash
# make native: what the native engine does on weights that were trained, of GPT-2's size: a short training of 124 million
# parameters on the CPU, its INT8 artifact, and `jaxgpt-bench native` on it. Half an hour to an hour on two cores; run
# again, what is done stays done. The model is no good (its loss says so); it is trained, which random weights are not.
set -euo pipefail

out=${1:-runs/gpt2-short}
results=${2:-$out}
mkdir -p "$out" "$results"

[ -e "$out/data/manifest.json" ] ||
  jaxgpt prepare --source stdlib --tokenizer gpt2 --val-fraction 0.02 --out "$out/data"
jaxgpt train gpt2 --data "$out/data" --out "$out/run" --max-steps 80 --batch-size 2 --grad-accum-steps 1 --loss-chunks 8 \
  --optimizer adamw --learning-rate 6e-4 --embedding-learning-rate 6e-4 --warmup-steps 10 --eval-every 80 --checkpoint-every 80 --sample-every 0
[ -e "$out/fp32/certificate.json" ] || jaxgpt-export convert --run "$out/run" --out "$out/fp32"
[ -e "$out/int8-dynamic/certificate.json" ] ||
  jaxgpt-export quantize --artifact "$out/fp32" --method int8-dynamic --out "$out/int8-dynamic"
jaxgpt-bench native --artifact "$out/int8-dynamic" --reference "$out/fp32" --data "$out/data" --prompts 2 --rounds 5 \
  --out "$results/native_gpt2_short.json"
