"""Continue a prompt with a folder that `jaxgpt-export onnx` wrote; pip install onnxruntime numpy tokenizers.

python onnx_generate.py FOLDER "Once upon a time" --temperature 0.8
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("prompt")
parser.add_argument("--max-new-tokens", type=int, default=60)
parser.add_argument(
    "--temperature", type=float, help="if not given the folder's, else 0: the most likely token"
)
parser.add_argument("--seed", type=int)
args = parser.parse_args()

config = json.loads((args.folder / "config.json").read_text(encoding="utf-8"))
said = json.loads((args.folder / "generation_config.json").read_text(encoding="utf-8"))
if args.temperature is None:
    args.temperature = said.get("temperature", 1.0) if said.get("do_sample") else 0.0
tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
session = onnxruntime.InferenceSession(str(args.folder / "model.onnx"), providers=["CPUExecutionProvider"])
binding = session.io_binding()
binding.bind_output("logits")
shapes = {each.name: each.shape for each in session.get_inputs() if each.name.startswith("past_key_values")}
cache = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
for name, array in cache.items():  # what a step reads, it writes into
    place = ("cpu", 0, np.float32, array.shape, array.ctypes.data)
    binding.bind_input(name, *place)
    binding.bind_output(name.replace("past_key_values", "present"), *place)

draw = np.random.default_rng(args.seed)
ids = tokenizer.encode(args.prompt).ids or [config["bos_token_id"]]
prompt, new, past = ids, ids, 0
if len(ids) >= config["n_positions"]:
    sys.exit(
        f"the prompt has {len(ids)} tokens, the context holds {config['n_positions']}; give a shorter one"
    )
while len(ids) < min(len(prompt) + args.max_new_tokens, config["n_positions"]):
    given = {  # kept by this name until the step is done: a binding holds addresses, not arrays
        "input_ids": np.array([new], np.int64),
        "position_ids": np.arange(past, len(ids), dtype=np.int64)[None],
        "seqlens_k": np.array([len(ids) - 1], np.int32),
        "total_sequence_length": np.array([len(ids)], np.int32),
    }
    for name, array in given.items():
        binding.bind_cpu_input(name, array)
    session.run_with_iobinding(binding)
    logits, past = binding.get_outputs()[0].numpy()[0, 0].astype(np.float64), len(ids)
    if args.temperature > 0:  # the largest of the scaled logits with Gumbel noise is a draw from the softmax
        logits = logits / args.temperature + draw.gumbel(size=len(logits))
    new = [int(logits.argmax())]
    if new[0] == config["eos_token_id"]:
        break
    ids = ids + new
sys.stdout.reconfigure(encoding="utf-8")
print(args.prompt + tokenizer.decode(ids[len(prompt) :]))
