#!/usr/bin/env bash
# make reference: the reference model, 5.9 million parameters, on the source of the installed packages, every
# quantization of it, and the page of `jaxgpt-bench reproduce`; then what goes beyond it. One to two hours on
# two cores; run again, what is done stays done.
set -euo pipefail

out=${1:-runs/reference}
results=${2:-$out}
mkdir -p "$out" "$results"

jaxgpt-bench reproduce cpu --source offline --out "$out"
cp "$out/quality.json" "$results/reference_quality.json"
cp "$out/report.json" "$results/reproduce_reference.json"

# Plain rounding of the same int4 layout, for comparison.
jaxgpt-export quantize --artifact "$out/fp32" --method int4-weight-only --data "$out/data" --out "$out/int4-nearest" \
  --observer nearest --overwrite
jaxgpt-export verify --artifact "$out/int4-nearest"
jaxgpt-bench quality --artifact "$out/fp32" "$out/int4-nearest" --data "$out/data" --tokens 131072 \
  --samples 0 --out "$results/reference_int4_nearest.json"
jaxgpt-bench outliers --artifact "$out/fp32" --data "$out/data" --out "$results/outliers.json"
jaxgpt-bench agreement --artifact "$out/fp32" --data "$out/data" --out "$results/agreement.json"
jaxgpt-bench integers --run "$out/qat" --artifact "$out/int8-static-qat" --data "$out/data" \
  --out "$results/reference_integers.json"
