"""torchao under torch.compile: a plain GPT-2 with a cache of fixed size, its weights frozen into the program.

int8-dynamic is its Int8DynamicActivationInt8WeightConfig. Weight-only INT8 computes in bfloat16: for that
alone its kernel is there, in float32 the weights would be unpacked when it is compiled. 4 bits: groups of 64,
its format for CPUs. Every length of a prompt is compiled anew, in the warm-up; the lengths of the cache are
not. The programs lie beside what is loaded, so that nothing is left on the disk.
"""

import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from jaxgpt_bench.peers.peer import (
    NO_SETTINGS,
    OPENMP,
    PLAIN,
    Artifact,
    Choice,
    Peer,
    Prepared,
    Settings,
    Variant,
    weight_bytes,
)

BITS = {"fp32": 32, "int8-dynamic": 8, "int8-weight-only": 8, "int4-weight-only": 4}
IN_BFLOAT16 = "int8-weight-only"
GROUP = 64
KERNEL_OUTPUTS = 16  # of the compiled kernel of 4 bits
SPAN = 16  # the part of the cache that is read grows in steps: one of 1 would be compiled apart
SETTING = "max_autotune"


@functools.cache
def _gpt_class() -> type:
    """Return the module's class; PyTorch is imported when it is asked for."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self, C: int, heads: int, context: int) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
            self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
            self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})
            self.heads = heads
            # Never read whole: that length would be compiled apart.
            shape = (1, heads, context + SPAN, C // heads)
            self.keys = nn.Buffer(torch.zeros(shape), persistent=False)
            self.values = nn.Buffer(torch.zeros(shape), persistent=False)

        def forward(self, x: Any, positions: Any, seen: Any) -> Any:
            B, T, C = x.shape
            qkv = self.attn["c_attn"](self.ln_1(x)).view(B, T, 3, self.heads, C // self.heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            self.keys[:, :, positions], self.values[:, :, positions] = k, v
            span = seen.shape[-1]
            y = functional.scaled_dot_product_attention(
                q, self.keys[:, :, :span], self.values[:, :, :span], attn_mask=seen
            )
            x = x + self.attn["c_proj"](y.transpose(1, 2).reshape(B, T, C))
            return x + self.mlp["c_proj"](functional.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))

    class Gpt(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            C = config.n_embd
            self.wte, self.wpe = nn.Embedding(config.vocab_size, C), nn.Embedding(config.block_size, C)
            blocks = (Block(C, config.n_head, config.block_size) for _ in range(config.n_layer))
            self.h = nn.ModuleList(blocks)
            self.ln_f = nn.LayerNorm(C)
            self.lm_head = nn.Linear(C, config.vocab_size, bias=False)

        def forward(self, tokens: Any, positions: Any, span: Any) -> Any:
            """Take tokens (T,), positions (T,) and span (S,), 0, 1, ...; return the last logits (V,)."""
            x = (self.wte(tokens) + self.wpe(positions))[None]
            seen = span[None] <= positions[:, None]
            for block in self.h:
                x = block(x, positions, seen[None, None])
            return self.lm_head(self.ln_f(x[:, -1:]))[0, 0]

    return Gpt


def _model(folder: Path, precision: str) -> Any:
    """Return the artifact's module, its linear layers quantized."""
    logging.getLogger("torchao").setLevel(logging.ERROR)  # kernels for GPUs that do not load here
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    import numpy as np
    import torch
    from jaxgpt_export.format.artifact import read_artifact
    from torchao import quantization
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

    artifact = read_artifact(folder)
    model = _gpt_class()(artifact.config).eval()
    tensors = {name: torch.from_numpy(np.array(tensor)) for name, tensor in artifact.tensors.items()}
    tensors.setdefault("lm_head.weight", tensors["wte.weight"].clone())  # a tied one would stay float
    model.load_state_dict(tensors)
    quiet = {"set_inductor_config": False}
    configs = {
        "int8-dynamic": lambda: quantization.Int8DynamicActivationInt8WeightConfig(**quiet),
        "int8-weight-only": lambda: quantization.Int8WeightOnlyConfig(**quiet),
        "int4-weight-only": lambda: PrototypeInt4WeightOnlyConfig(group_size=GROUP, **quiet),
    }
    if precision == IN_BFLOAT16:
        model = model.bfloat16()
    if precision in configs:
        quantization.quantize_(model, configs[precision]())
    return model


class TorchaoSession:
    """The module with a cache of its own.

    Args:
      folder: the artifact.
      precision: the row's.
      cache: a folder for compiled programs; None computes without compiling.
      autotune: the compiler times its own matrix products beside the library's.
    """

    def __init__(self, folder: Path, precision: str, cache: Path | None, autotune: bool = False) -> None:
        if cache is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
            # In this process: a worker of the compiler's own that was gone once kept it waiting for ever.
            os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        import torch

        self._torch = torch
        self._model = _model(folder, precision)
        self.block_size = int(self._model.wpe.num_embeddings)
        self._run = self._model
        if cache is not None:
            import torch._inductor.config

            # As an option of torch.compile it comes too late: weights stay arguments, summed up in each step.
            torch._inductor.config.freezing = True
            self._run = torch.compile(self._model, dynamic=False, options={"max_autotune": autotune})
        self._length = 0

    def prefill(self, tokens: Sequence[int]) -> Any:
        """Take a prompt; return the logits (V,) after it."""
        self._length = 0
        return self._take(tokens)

    def decode(self, token: int) -> Any:
        """Take one more token; return the logits (V,) after it."""
        return self._take([token])

    def _take(self, tokens: Sequence[int]) -> Any:
        torch, first = self._torch, self._length
        self._length += len(tokens)
        span = torch.arange(-(-self._length // SPAN) * SPAN)
        torch._dynamo.mark_dynamic(span, 0)
        with torch.no_grad():
            positions = torch.arange(first, self._length)
            return self._run(torch.tensor(list(tokens)), positions, span).float().numpy()


class Torchao(Peer):
    """torchao.

    Attributes:
      compiled: False computes without compiling, which takes no minute and is several times slower.
    """

    engine: ClassVar[str] = "torchao"
    modules: ClassVar[tuple[str, ...]] = ("torchao",)
    install: ClassVar[str] = "torchao"
    precisions: ClassVar[tuple[str, ...]] = tuple(BITS)
    environments: ClassVar[tuple[dict[str, str], ...]] = OPENMP
    compiled: bool = True

    def kv_bytes_beside(self, precision: str) -> int:
        """Return 2 where the module and with it the cache are in bfloat16, else 4."""
        return 2 if precision == IN_BFLOAT16 else 4

    def convert(self, artifact: Artifact, precision: str, scratch: Path, threads: int) -> Prepared:
        """Link the artifact; rounding and compiling are done when it is loaded."""
        if self.compiled and BITS[precision] == 4 and artifact.config.vocab_size % KERNEL_OUTPUTS:
            raise RuntimeError(
                f"its 4 bits take outputs in {KERNEL_OUTPUTS}s, the head has {artifact.config.vocab_size}"
            )
        folder = scratch / "model"
        folder.mkdir()
        for file in artifact.folder.resolve().iterdir():
            (folder / file.name).symlink_to(file)

        def matrix_bytes(matrix: Any) -> float:
            O, I = matrix.shape
            scales = {8: 4.0 * O, 4: 4.0 * O * I / GROUP}  # 4 bits: a scale and a zero point in 16 each
            return O * I * BITS[precision] / 8 + scales.get(BITS[precision], 0.0)

        return Prepared(folder, weight_bytes(artifact, matrix_bytes))

    def choices(self, precision: str) -> tuple[Choice, ...]:
        """Tune always: a product that the compiler generates is taken only where it was faster.

        Each way compiles anew, and holds gigabytes.
        """
        return tuple(Choice(environment, {SETTING: self.compiled}) for environment in self.environments)

    def open(
        self,
        path: Path,
        precision: str,
        threads: int,
        variant: Variant = PLAIN,
        settings: Settings = NO_SETTINGS,
    ) -> TorchaoSession:
        """Quantize and compile."""
        import torch

        torch.set_num_threads(threads)
        cache = path.parent / "compiled" if self.compiled else None
        return TorchaoSession(path, precision, cache, settings.get(SETTING, False))


PEER = Torchao()
