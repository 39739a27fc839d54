#!/usr/bin/env bash
# make demo: the whole pipeline on real input, on the CPU. Each line is a command that users have too.
set -euo pipefail

out=${1:-runs/demo}
rm -f "$out/report.html" "$out/report.json"
mkdir -p "$out"

jaxgpt prepare --source stdlib --tokenizer bpe:2048 --val-fraction 0.08 --out "$out/data" --overwrite
rm -rf "$out/run"  # a demo shows a whole training, not the end of an earlier one
jaxgpt train tiny --data "$out/data" --out "$out/run" --cpu-devices 2

jaxgpt-export convert --run "$out/run" --out "$out/fp32" --overwrite
jaxgpt-export verify --artifact "$out/fp32" --run "$out/run"
for method in int8-dynamic int8-static; do
  jaxgpt-export quantize --artifact "$out/fp32" --method "$method" --data "$out/data" --out "$out/$method" --overwrite
  jaxgpt-export verify --artifact "$out/$method"
done

models=("$out/fp32" "$out/int8-dynamic" "$out/int8-static")
jaxgpt-bench quality --run "$out/run" --artifact "${models[@]}" --data "$out/data" --out "$out/quality.json"
jaxgpt-bench generate --run "$out/run" --artifact "${models[@]}" --tokens 250 --threads 1 --uncached --out "$out/speed.json"
jaxgpt-bench generate --preset gpt2 --kind fp32 int8-dynamic int4-dynamic --tokens 100 --rounds 3 --out "$out/speed-gpt2.json"
jaxgpt-bench report --run "$out/run" --fp32 "$out/fp32" --quality "$out/quality.json" \
  --speed "$out/speed.json" "$out/speed-gpt2.json" --out "$out"
