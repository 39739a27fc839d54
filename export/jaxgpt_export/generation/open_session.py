"""The session that generates: the native engine where it can, the PyTorch module else.

PyTorch is imported only where the module is to run.
"""

from jaxgpt.generation.session import Session
from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.machine import usable_cores

from jaxgpt_export.format.artifact import Artifact
from jaxgpt_export.native.native_model import NativeModel, unsupported_reason
from jaxgpt_export.native.native_session import CacheKind, NativeSession


def choose_threads(count: int) -> int:
    """Return how many threads to take: `count`, or for 0 all cores that this process may use.

    Raises:
      UserError: there are not so many cores.
    """
    cores = usable_cores()
    if not 0 <= count <= cores:
        raise UserError(
            f"threads ({count}) must lie in 0 (all) to {cores}, the cores that this process may use"
        )
    return count or cores


def open_session(
    artifact: Artifact, engine: str, threads: int, cache: CacheKind = "fp16", slots: int = 1
) -> tuple[Session, str]:
    """Return a session of an artifact and the name of its engine.

    Args:
      artifact: that was read.
      engine: "native", "torch", or "auto": native where it can, else the module, which is said.
      threads: that compute.
      cache: what the native engine keeps keys and values as; an exact module rounds them to float16 too.
      slots: texts side by side; the native engine only.

    Raises:
      UserError: "native" was asked for and cannot be.
    """
    reason = unsupported_reason(artifact) if engine == "auto" else None
    if engine != "torch" and reason is None:
        model = NativeModel(artifact, threads)
        return NativeSession(model, slots, cache), f"jaxgpt-native ({model.isa})"
    if reason is not None and artifact.quantization is not None:
        say(f"the PyTorch module runs, which is slower; not the native engine, because {reason}")
    return _torch_session(artifact, threads, cache), "jaxgpt-torch"


def _torch_session(artifact: Artifact, threads: int, cache: CacheKind) -> Session:
    import torch

    from jaxgpt_export.generation.torch_session import TorchSession
    from jaxgpt_export.model.build import build_model

    torch.set_num_threads(threads)
    module = build_model(artifact)
    as_native = module.exact and cache == "fp16"  # then both give the same text
    return TorchSession(module, torch.float16 if as_native else torch.float32)
