"""Parity: how far one model is from another, for this project's gates and for other people's tests.

    reference, model = open_model("runs/demo/run"), open_model("runs/demo/int8-dynamic")
    compare_models(reference, model, tokens)          # logits, KL, top-1, loss, where greedy texts part
    first_deviation(reference, model, tokens)         # the first layer that computes something else
    assert_logits_close(reference, model, tokens)     # for tests; the failure names layer and tensor

A model is a run folder, an artifact, a Hugging Face GPT-2 folder or an nn.Module.
"""

from jaxgpt_export.parity.asserts import assert_logits_close, assert_quantization_loss
from jaxgpt_export.parity.comparable import Comparable
from jaxgpt_export.parity.comparison import Comparison, compare_models
from jaxgpt_export.parity.layers import Deviation, first_deviation
from jaxgpt_export.parity.metrics import Parity, ParityMeter, compare
from jaxgpt_export.parity.models import open_model

__all__ = [
    "Comparable",
    "Comparison",
    "Deviation",
    "Parity",
    "ParityMeter",
    "assert_logits_close",
    "assert_quantization_loss",
    "compare",
    "compare_models",
    "first_deviation",
    "open_model",
]
