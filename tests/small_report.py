"""A report of a reproduction with few models, and the committed one; what their pages say."""

import json
import re
from pathlib import Path
from typing import Any

from jaxgpt_bench.quality.samples import FIXED_PROMPTS
from jaxgpt_bench.reproduce.page.render import markdown_block

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "bench" / "results" / "reproduce_reference.json"
LONG = "a" * 90
MACHINE = {
    "cpu": "a CPU", "cores": 2, "memory_gb": 8.0, "system": "Linux", "python": "3.11",
    "packages": {"jax": "1"}, "instruction_sets": ["avx2", "avx512_vnni"],
}  # fmt: skip


def speed_row(engine: str, precision: str, rate: float, **other: Any) -> dict[str, Any]:
    """A row as `jaxgpt-bench generate` gives it; the rate is that of the whole time."""
    return {
        "engine": engine, "precision": precision, "cached": True, "every_logit": False,
        "decode_tokens_per_s": {"median": 1.25 * rate, "min": rate, "max": 1.5 * rate},
        "seconds": {"median": 250 / rate, "min": 220 / rate, "max": 270 / rate},
        "prefill_tokens_per_s": {"median": 9 * rate, "min": 8 * rate, "max": 9 * rate},
        "bytes_per_token": 2_000_000, "read_gb_s": 0.006 * rate, "settings": {},
        "ceiling_tokens_per_s": 3 * rate, "ceiling_share": 1 / 3, "file_mb": 1.5,
        "peak_rss_mb": 300.0, "greedy_agrees": 240, "greedy_tokens": [1] * 250, **other,
    }  # fmt: skip


def speed_figures() -> dict[str, Any]:
    """What `jaxgpt-bench generate` gives, without the minutes."""
    found = [
        speed_row("jaxgpt-torch", "fp32", 50.0),
        speed_row("jaxgpt-native", "int8-dynamic", 400.0),
        speed_row("jaxgpt-torch", "int8-dynamic", 100.0),
        speed_row("jaxgpt-torch", "int8-static-qat", 120.0),
        speed_row("jaxgpt-flax", "fp32", 30.0),
        speed_row("transformers", "fp32", 60.0),
        speed_row("transformers", "fp32", 10.0, cached=False, every_logit=True),
        speed_row("torch-quantize-dynamic", "int8-dynamic", 66.0),
        speed_row("onnxruntime", "fp32", 80.0),
        speed_row("onnxruntime", "int8-weight-only", 420.0),
        speed_row("onnxruntime", "int4-weight-only", 900.0),
    ]
    model = {"n_layer": 2, "n_embd": 32}
    return {
        "settings": {"preset": None, "model": model, "tokens": 250, "prompt_tokens": 16, "threads": 2},
        "rounds": 1, "bandwidth_gb_s": [10.0], "rows": found,
        "left_out": {"openvino": "openvino not installed (pip install openvino)"},
        "machine": MACHINE,
        "date": "2026-01-03T04:05:06+00:00", "commit": "5beed",
    }  # fmt: skip


def small_report() -> dict[str, Any]:
    """A report.json as a run gives it, of few models."""
    row = {"val_loss": 2.0, "loss_increase": 0.0, "difference_error": None, "kl_mean": None, "fastest": None,
           "top1_agreement": 1.0, "parse_share": 0.5, "parse_cut": 5, "size_mb": 8.0,
           "val_bits_per_byte": 0.9, "kl_max": None, "max_abs_logit_diff": None}  # fmt: skip
    compared = {**row, "kl_mean": 1e-4}
    sample = {"prompt": FIXED_PROMPTS[0], "temperature": 0.0, "model": "torch-fp32",
              "finish_reason": "length",
              "text": "<script>alert(1)</script> " + "x" * 900, "tokens": 250,
              "verbatim": {"tokens": 3, "text": "x x"}}  # fmt: skip
    return {
        "preset": "cpu", "about": "a test", "date": "2026-01-04T04:05:06+00:00", "commit": "c0ffee",
        "command": f"jaxgpt-bench reproduce cpu --out runs/{LONG} --other-text 'head.jsonl=rows & more'",
        "machine": MACHINE,
        "data": {"source": "packages:numpy,jax", "revision": "numpy 2", "is_the_original_s": False,
                 "tokenizer": {"name": "bpe:384"},
                 "counts": {"train_documents": 9, "val_documents": 3, "val_overlapping": 208},
                 "manifest_sha256": "ab" * 32},
        "train": {"preset": "small", "steps": 40, "parameters": 5_900_000, "tokens_seen": 9_800_000,
                  "step_taken": 40, "xz_bits_per_byte": 1.6,
                  "curve": {"train": [[1, 5.0], [40, 2.5]], "val": [[20, 3.0], [40, 2.0]]}},
        "parity": {"max_abs_logit_diff": 1e-5},
        "files": {"model.safetensors": "cd" * 32},
        "quality": {"reference": "flax-fp32", "val_tokens": 1024, "val_bytes": 4096, "xz_bits_per_byte": 1.6,
                    "windows": "spread evenly over the validation split",
                    "parse_held_out": {"texts": 24, "parse": 13, "cut": 9},
                    "date": "2026-01-02T04:05:06+00:00", "commit": "900d", "parse_samples": 24,
                    "parse_tokens": 200, "machine": MACHINE},
        "models": [
            {**row, "name": "flax-fp32"},
            {**compared, "name": "torch-fp32", "loss_increase": -4e-9, "difference_error": 1e-9},
            {**compared, "name": "fp32-qat", "val_loss": 1.98, "loss_increase": -0.02,
             "difference_error": 0.001},
            {**compared, "name": "int8-dynamic", "val_loss": 2.001, "loss_increase": 0.001,
             "difference_error": 0.0007, "size_mb": 2.0},
            {**compared, "name": "int8-static-qat", "val_loss": 1.983, "loss_increase": -0.017,
             "difference_error": 0.001, "size_mb": 2.0,
             "parent": {"name": "fp32-qat", "difference": 0.003, "difference_error": 0.0004, "kl_mean": 3e-4,
                        "top1": 0.987}},
        ],
        "original": {"val_loss": (1.3223, 1.3350), "size_mb": (620.33, 148.88), "tokens_per_s": (2.95, 4.01)},
        "speed": speed_figures(),
        "samples": [sample, {**sample, "model": "int8-dynamic"},
                    {**sample, "temperature": 0.8, "text": "def average():\n    pass"}],
        "sampling": {"seed": 0, "longest": 250},
        "other_text": [{"file": "head.jsonl", "about": "rows & more", "sha256": "ef" * 32, "documents": 356,
                        "tokens": 9, "bytes": 30, "documents_shared_with_training": 0,
                        "xz_bits_per_byte": 1.8,
                        "rows": [{"name": "flax-fp32", "loss": 3.5, "loss_increase": 0.0,
                                  "difference_error": None, "bits_per_byte": 1.9},
                                 {"name": "int8-dynamic", "loss": 3.6, "loss_increase": 0.1,
                                  "difference_error": 0.02, "bits_per_byte": 1.95}]}],
        "memorization": {"overlap": {"run_tokens": 50, "documents": 1913, "sharing": 0,
                                     "dropped": 208, "too_short": 77},
                         "train_tokens": 12_875_930,
                         "summary": [
                             {"name": "held-out", "texts": 24, "median_tokens": 12.5, "max_tokens": 49,
                              "whole": 0},
                             {"name": "int8-dynamic", "texts": 24, "median_tokens": 9.0, "max_tokens": 31,
                              "whole": 0}]},
        "stages": [{"stage": "data", "kept": True, "seconds": 0.0},
                   {"stage": "train", "kept": True, "seconds": 0.0,
                    "made": {"date": "2026-01-01T04:05:06+00:00", "commit": "7ea1", "seconds": 4321.0}}],
    }  # fmt: skip


def committed_report() -> dict[str, Any]:
    report: dict[str, Any] = json.loads(COMMITTED.read_text())
    return report


def plain(page: str) -> str:
    return re.sub(r"<[^>]+>", "\n", page).replace("&#39;", "'").replace("&amp;", "&")


def claim_rows(report: dict[str, Any]) -> list[list[str]]:
    """The table of claims, as docs/reproduction.md has it."""
    lines = markdown_block(report).split("\n")
    at = next(index for index, line in enumerate(lines) if line.startswith("| float32 to INT8"))
    return [line.strip("| ").split(" | ") for line in lines[at + 2 : at + 8]]
