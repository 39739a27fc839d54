"""Parity: how far one model is from another, for this project's gates and for other people's tests.

    reference, model = open_model("runs/demo/run"), open_model("runs/demo/int8-dynamic")
    compare_models(reference, model, tokens)          # logits, KL, top-1, loss, where greedy texts part
    first_deviation(reference, model, tokens)         # the first layer that computes something else
    assert_logits_close(reference, model, tokens)     # for tests; the failure names layer and tensor

A model is a run folder, an artifact, a Hugging Face GPT-2 folder or an nn.Module.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxgpt_export.parity.asserts import assert_logits_close as assert_logits_close
    from jaxgpt_export.parity.asserts import assert_quantization_loss as assert_quantization_loss
    from jaxgpt_export.parity.comparable import Comparable as Comparable
    from jaxgpt_export.parity.comparison import Comparison as Comparison
    from jaxgpt_export.parity.comparison import compare_models as compare_models
    from jaxgpt_export.parity.layers import Deviation as Deviation
    from jaxgpt_export.parity.layers import first_deviation as first_deviation
    from jaxgpt_export.parity.metrics import Parity as Parity
    from jaxgpt_export.parity.metrics import ParityMeter as ParityMeter
    from jaxgpt_export.parity.metrics import compare as compare
    from jaxgpt_export.parity.models import open_model as open_model

# Public name -> the file that has it; imported when it is first asked for, as PyTorch takes a second.
_PUBLIC = {
    "Comparable": "comparable",
    "Comparison": "comparison",
    "Deviation": "layers",
    "Parity": "metrics",
    "ParityMeter": "metrics",
    "assert_logits_close": "asserts",
    "assert_quantization_loss": "asserts",
    "compare": "metrics",
    "compare_models": "comparison",
    "first_deviation": "layers",
    "open_model": "models",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
