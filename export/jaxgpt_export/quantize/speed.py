"""How fast a quantized model is beside float on this machine, in the engine that will run it."""

import statistics
import time
from typing import Any, NamedTuple

from jaxgpt.generation.session import Session
from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError

from jaxgpt_export.format.artifact import Artifact
from jaxgpt_export.generation.open_session import default_cache
from jaxgpt_export.generation.torch_session import TorchSession
from jaxgpt_export.model.build import as_arrays
from jaxgpt_export.model.gpt import GPT
from jaxgpt_export.native.native_model import NativeModel, unsupported_reason
from jaxgpt_export.native.native_session import NativeSession
from jaxgpt_export.quantize.quantizer import Quantizer
from jaxgpt_export.quantize.state_dict import QuantizedStateDict

TOKENS, ROUNDS = 32, 5


class Speed(NamedTuple):
    """What a few tokens took.

    Attributes:
      against_float: tokens/s over those of the float model, one text at a time.
      engine: of both: native, or torch (the PyTorch module).
      reason: why that was not the native one; None where it was.
    """

    against_float: float
    engine: str
    reason: str | None


def try_speed(quantizer: Quantizer, candidate: QuantizedStateDict, model: GPT) -> Speed | None:
    """Time a candidate as measure_speed does; None, and a line, where its engine can't run here.

    Both models take memory beside what rounding took, and JAXGPT_ISA may name what this machine lacks: that
    is no reason to throw away what was rounded.
    """
    try:
        return measure_speed(quantizer, candidate, model)
    except UserError as error:
        say(f"its speed beside float was not measured: {error}")
        return None


def measure_speed(quantizer: Quantizer, candidate: QuantizedStateDict, model: GPT) -> Speed:
    """Time a candidate against float: short trials, interleaved.

    Args:
      quantizer: of the float model.
      candidate: what was rounded.
      model: its module.

    Raises:
      UserError: the engine has too little memory, or JAXGPT_ISA asks for what it can't do.
    """
    tensors = as_arrays(candidate.tensors)
    artifact = Artifact(quantizer.artifact.folder, quantizer.config, candidate.quantization, tensors)
    reason = unsupported_reason(artifact)
    sessions: list[Session]
    if reason is None:
        pair = (quantizer.artifact, artifact)
        sessions = [NativeSession(NativeModel(each), cache=default_cache(each)) for each in pair]
    else:
        sessions = [TorchSession(quantizer.reference), TorchSession(model)]
    ratios = []
    for _ in range(ROUNDS):
        of_float, of_model = (_decode_seconds(session, quantizer.config.vocab_size) for session in sessions)
        ratios.append(of_float / of_model)
    ratio = statistics.median(ratios[1:])  # the first prepares
    return Speed(ratio, "torch" if reason else "native", reason)


def speed_figures(speed: Speed | None) -> dict[str, Any]:
    """Return what a trial gave, under the names of figures; nothing where there was none."""
    return {} if speed is None else {"speed_against_float": speed.against_float, "speed_engine": speed.engine}


def _decode_seconds(session: Session, vocab_size: int) -> float:
    started = time.perf_counter()
    session.prefill([0])
    for token in range(1, min(TOKENS, session.block_size)):
        session.decode(token % vocab_size)
    return time.perf_counter() - started
