#!/usr/bin/env bash
# make reference: the reference model, 5.9 million parameters, on the source of the installed packages, and every
# quantization of it. About an hour and a half on two cores; run again, the trainings go on where they stopped.
set -euo pipefail

out=${1:-runs/reference}
results=${2:-$out}
packages=torch,transformers,jax,flax,optax,orbax,numpy,datasets,scipy,pandas,sympy,networkx,matplotlib
mkdir -p "$out" "$results"

if [ ! -e "$out/data/manifest.json" ]; then
  jaxgpt prepare --source "packages:$packages" --tokenizer bpe:4096 --val-fraction 0.04 --out "$out/data"
fi
jaxgpt train small --data "$out/data" --out "$out/run" --n-layer 6 --n-head 4 --n-embd 256 --batch-size 8 \
  --max-steps 2400 --learning-rate 0.02 --embedding-rate 0.01 --warmup-steps 60 \
  --eval-every 1200 --checkpoint-every 200 --sample-every 1200
jaxgpt train small --data "$out/data" --init "$out/run" --qat --out "$out/qat" --batch-size 8 --max-steps 200 \
  --learning-rate 0.002 --embedding-rate 0.0005 --warmup-steps 20 --eval-every 200 --checkpoint-every 100 --sample-every 0

quantize() { # parent, method, name, other options
  jaxgpt-export quantize --artifact "$out/$1" --method "$2" --data "$out/data" --out "$out/$3" --overwrite "${@:4}"
  jaxgpt-export verify --artifact "$out/$3"
}
jaxgpt-export convert --run "$out/run" --out "$out/fp32" --overwrite
jaxgpt-export convert --run "$out/qat" --out "$out/fp32-qat" --overwrite
quantize fp32 dynamic int8-dynamic
quantize fp32 static int8-static
quantize fp32-qat static-qat int8-static-qat
quantize fp32 weight-only-int8 int8-weight-only
quantize fp32 weight-only-int4 int4-weight-only
quantize fp32 weight-only-int4 int4-nearest --observer nearest

models=()
for name in fp32 int8-dynamic int8-static int8-static-qat int8-weight-only int4-weight-only; do models+=("$out/$name"); done
jaxgpt-bench quality --run "$out/run" --artifact "${models[@]}" --data "$out/data" --tokens 131072 \
  --out "$results/reference_quality.json"
jaxgpt-bench quality --artifact "$out/fp32" "$out/int4-nearest" --data "$out/data" --tokens 131072 \
  --samples 0 --out "$results/reference_int4_nearest.json"
jaxgpt-bench outliers --artifact "$out/fp32" --data "$out/data" --out "$results/outliers.json"
jaxgpt-bench agreement --artifact "$out/fp32" --data "$out/data" --out "$results/agreement.json"
jaxgpt-bench integers --run "$out/qat" --artifact "$out/int8-static-qat" --data "$out/data" \
  --out "$results/reference_integers.json"
