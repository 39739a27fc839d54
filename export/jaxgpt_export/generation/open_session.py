"""The session that generates: the native engine where it can, the PyTorch module else.

PyTorch is imported only where the module is to run.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

from jaxgpt.generation.sampling import require_number
from jaxgpt.generation.session import Session
from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError, nearest, quoted
from jaxgpt.shared.machine import usable_cores
from jaxgpt.shared.tensor_file import require_unchanged

from jaxgpt_export.format.artifact import Artifact
from jaxgpt_export.native.native_model import NativeModel, unsupported_reason
from jaxgpt_export.native.native_session import CacheKind, NativeSession

Engine = Literal["auto", "native", "torch"]
CacheOption = Literal["auto", "fp32", "fp16", "int8"]


def choose_threads(count: int) -> int:
    """Return how many threads to take: `count`, or for 0 all cores that this process may use.

    Raises:
      UserError: there are not so many cores.
    """
    require_number("threads", count, whole=True)
    cores = usable_cores()
    if not 0 <= count <= cores:
        raise UserError(
            f"threads ({quoted(count)}) must lie in 0 (all) to {cores}, the cores that this process may use"
        )
    return count or cores


def check_choices(engine: object, cache: object) -> None:
    """Raise UserError for an engine or a cache that there is not, or that do not go together."""
    for name, value, known in (
        ("engine", engine, get_args(Engine)),
        ("kv_cache", cache, get_args(CacheOption)),
    ):
        if value not in known:
            raise UserError(f"{name} {value!r} is unknown; {nearest(str(value), known)}")
    if (engine, cache) == ("torch", "int8"):
        raise UserError(
            "kv_cache int8 is the native engine's: the PyTorch module keeps keys and values as fp32 or fp16"
        )


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """An artifact's weights in memory, ready to compute.

    Attributes:
      engine: its name, such as "jaxgpt-native (avx512-vnni)" or "jaxgpt-torch".
      new_session: makes a session with so many slots; the module's has one, whatever is asked.
      exact: logits are the same bits however tokens are split over steps.
    """

    engine: str
    new_session: Callable[[int], Session]
    exact: bool = True


def default_cache(artifact: Artifact) -> CacheKind:
    """Return what keys and values are kept as if nobody says: fp32 beside float32 weights, else fp16."""
    return "fp32" if artifact.quantization is None else "fp16"


def open_model(artifact: Artifact, engine: str, threads: int, cache: CacheOption = "auto") -> OpenModel:
    """Bring an artifact's weights into the form in which they are computed with.

    Args:
      artifact: that was read; its tensors are to be dropped afterwards: edits of them are lost.
      engine: "native", "torch", or "auto": native where it can, else the module, which is said.
      threads: that compute.
      cache: what the native engine keeps keys and values as; "auto" is fp16, or fp32 where all weights are
        float32. An exact module rounds them to float16 too.

    Raises:
      UserError: "native" was asked for and cannot be, or the artifact's file was written to meanwhile.
    """
    check_choices(engine, cache)
    kept_as = default_cache(artifact) if cache == "auto" else cache
    reason = unsupported_reason(artifact) if engine == "auto" else None
    if engine != "torch" and reason is None:
        model = NativeModel(artifact, threads, release=True)
        return OpenModel(f"jaxgpt-native ({model.isa})", lambda slots: NativeSession(model, slots, kept_as))
    if reason is not None and cache == "int8":
        raise UserError(f"kv_cache int8 is the native engine's, which does not run here, because {reason}")
    if reason is not None:
        say(f"the PyTorch module runs, which is slower; not the native engine, because {reason}")
    opened = _torch_model(artifact, threads, kept_as)
    require_unchanged(artifact.tensors.values())
    return opened


def open_session(
    artifact: Artifact, engine: str, threads: int, cache: CacheOption = "auto", slots: int = 1
) -> tuple[Session, str]:
    """Return a session of an artifact and the name of its engine; arguments and errors are open_model's."""
    model = open_model(artifact, engine, threads, cache)
    return model.new_session(slots), model.engine


def _torch_model(artifact: Artifact, threads: int, cache: CacheKind) -> OpenModel:
    import torch

    from jaxgpt_export.generation.torch_session import TorchSession
    from jaxgpt_export.model.build import build_model

    torch.set_num_threads(threads)
    module = build_model(artifact)
    as_native = module.exact and cache == "fp16"  # then both give the same text
    rounded_to = torch.float16 if as_native else torch.float32
    return OpenModel("jaxgpt-torch", lambda slots: TorchSession(module, rounded_to), module.exact)
