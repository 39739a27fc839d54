#!/usr/bin/env bash
# make reference: the reference model, 5.9 million parameters, on the source of the installed packages.
# About an hour on two cores; running it again goes on where it stopped.
set -euo pipefail

out=${1:-runs/reference}
packages=torch,transformers,jax,flax,optax,orbax,numpy,datasets,scipy,pandas,sympy,networkx,matplotlib
mkdir -p "$out"

if [ ! -e "$out/data/manifest.json" ]; then
  jaxgpt prepare --source "packages:$packages" --tokenizer bpe:4096 --val-fraction 0.04 --out "$out/data"
fi
jaxgpt train small --data "$out/data" --out "$out/run" --n-layer 6 --n-head 4 --n-embd 256 --batch-size 8 \
  --max-steps 2400 --learning-rate 0.02 --embedding-rate 0.01 --warmup-steps 60 \
  --eval-every 1200 --checkpoint-every 200 --sample-every 1200
