"""ExecuTorch: programs compiled ahead of time; matrices by XNNPACK, attention by an operator with a cache.

int8-dynamic and int4-dynamic round each row of inputs to 8 bits when it comes; 4-bit weights have groups of
64. XNNPACK computes GELU by the error function, where GPT-2 has a formula with tanh; left to the portable
operators it keeps that formula, and was slower on every machine so far. The package is in no extra: it brings
coremltools and 16 others along.
"""

import functools
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from jaxgpt_bench.peers.peer import (
    NO_SETTINGS,
    PLAIN,
    Artifact,
    Peer,
    Prepared,
    Settings,
    Variant,
    weight_bytes,
)

GROUP = 64
BITS = {"fp32": 32, "int8-dynamic": 8, "int4-dynamic": 4}
SETTING = "delegated"  # what XNNPACK takes: matrices alone, or whatever else it can
MATRICES, ALL = "matrices", "all"


@functools.cache
def _gpt_class() -> type:
    """Return the module's class; PyTorch is imported when it is asked for."""
    import torch
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  torch.ops.llama
    from torch import nn
    from torch.nn import functional

    llama = torch.ops.llama

    class Block(nn.Module):
        def __init__(self, C: int, heads: int, context: int) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
            self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
            self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})
            self.heads = heads
            shape = (1, context, heads, C // heads)
            self.keys = nn.Buffer(torch.zeros(shape), persistent=False)
            self.values = nn.Buffer(torch.zeros(shape), persistent=False)

        def forward(self, x: Any, first: Any) -> Any:
            B, T, C = x.shape
            q, k, v = self.attn["c_attn"](self.ln_1(x)).split(C, 2)
            split = (B, T, self.heads, C // self.heads)
            llama.update_cache(k.view(split), self.keys, first)
            llama.update_cache(v.view(split), self.values, first)
            y = llama.custom_sdpa(q.view(split), self.keys, self.values, first, None, 0.0, True)
            x = x + self.attn["c_proj"](y.reshape(B, T, C))
            return x + self.mlp["c_proj"](functional.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))

    class Gpt(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            C, self.context = config.n_embd, config.block_size
            self.wte, self.wpe = nn.Embedding(config.vocab_size, C), nn.Embedding(config.block_size, C)
            blocks = (Block(C, config.n_head, config.block_size) for _ in range(config.n_layer))
            self.h = nn.ModuleList(blocks)
            self.ln_f = nn.LayerNorm(C)
            self.lm_head = nn.Linear(C, config.vocab_size, bias=False)

        def forward(self, tokens: Any, positions: Any) -> Any:
            """Take tokens (T,) and their positions (T,); return the last logits (V,)."""
            first = positions[0].item()
            torch._check(first >= 0)
            torch._check(first < self.context)
            x = (self.wte(tokens) + self.wpe(positions))[None]
            for block in self.h:
                x = block(x, first)
            return self.lm_head(self.ln_f(x[:, -1:]))[0, 0]

    return Gpt


def _program(artifact: Artifact, precision: str, delegated: str) -> bytes:
    """Return the compiled program of an artifact."""
    import numpy as np
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
        XnnpackDynamicallyQuantizedPartitioner,
        XnnpackFloatingPointPartitioner,
        XnnpackPartitioner,
    )
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from torchao import quantization
    from torchao.quantization.granularity import PerAxis, PerGroup

    config = artifact.config
    model = _gpt_class()(config).eval()
    tensors = {name: torch.from_numpy(np.array(tensor)) for name, tensor in artifact.tensors.items()}
    tensors.setdefault("lm_head.weight", tensors["wte.weight"].clone())
    model.load_state_dict(tensors)
    if precision != "fp32":
        bits = BITS[precision]
        quantize_config = quantization.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            weight_granularity=PerAxis(0) if bits == 8 else PerGroup(GROUP),
        )
        quantization.quantize_(model, quantize_config)
    length = torch.export.Dim("T", min=1, max=config.block_size)
    example = min(8, config.block_size)
    with torch.no_grad():
        exported = torch.export.export(
            model,
            (torch.zeros(example, dtype=torch.long), torch.arange(example)),
            dynamic_shapes=({0: length}, {0: length}),
            strict=False,
        )
    matrix_partitioner = (
        XnnpackFloatingPointPartitioner() if precision == "fp32" else XnnpackDynamicallyQuantizedPartitioner()
    )
    partitioners = [matrix_partitioner, *([XnnpackPartitioner()] if delegated == ALL else [])]
    edge = to_edge_transform_and_lower(
        exported, partitioner=partitioners, compile_config=EdgeCompileConfig(_check_ir_validity=False)
    )
    return bytes(edge.to_executorch().buffer)


class ExecutorchSession:
    """A loaded program, whose cache belongs to it.

    Args:
      path: of the program.
      threads: CPU threads.
    """

    def __init__(self, path: Path, threads: int) -> None:
        import torch
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  its kernels
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        portable_lib._unsafe_reset_threadpool(threads)
        self._torch = torch
        self._program = Runtime.get().load_program(path)
        self._method = self._program.load_method("forward")
        self.block_size = int(self._method.metadata.input_tensor_meta(0).sizes()[0])
        self._length = 0

    def prefill(self, tokens: Sequence[int]) -> Any:
        """Take a prompt; return the logits (V,) after it."""
        self._length = 0
        return self._take(tokens)

    def decode(self, token: int) -> Any:
        """Take one more token; return the logits (V,) after it."""
        return self._take([token])

    def _take(self, tokens: Sequence[int]) -> Any:
        first = self._length
        self._length += len(tokens)
        positions = self._torch.arange(first, self._length)
        return self._method.execute([self._torch.tensor(list(tokens)), positions])[0].numpy()


class Executorch(Peer):
    """ExecuTorch."""

    engine: ClassVar[str] = "executorch"
    modules: ClassVar[tuple[str, ...]] = ("executorch",)
    install: ClassVar[str] = "executorch"
    changes_values: ClassVar[bool] = True
    precisions: ClassVar[tuple[str, ...]] = tuple(BITS)

    def convert(self, artifact: Artifact, precision: str, scratch: Path, threads: int) -> Prepared:
        """Compile it in two ways."""
        if BITS[precision] == 4 and artifact.config.n_embd % GROUP:
            channels = artifact.config.n_embd
            raise RuntimeError(f"its 4 bits take inputs in {GROUP}s, this model has {channels} channels")
        for name in ("torchao", "torch.utils._pytree", "executorch"):
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for delegated in (MATRICES, ALL):
                _file(scratch, delegated).write_bytes(_program(artifact, precision, delegated))

        def matrix_bytes(matrix: Any) -> float:
            O, I = matrix.shape
            scales = {8: 4.0 * O, 4: 2.0 * O * I / GROUP}
            return O * I * BITS[precision] / 8 + scales.get(BITS[precision], 0.0)

        return Prepared(scratch, weight_bytes(artifact, matrix_bytes), _file(scratch, MATRICES))

    def settings_tried(self, precision: str) -> tuple[Settings, ...]:
        """Give XNNPACK the matrices alone, or whatever it can compute."""
        return tuple({SETTING: delegated} for delegated in (MATRICES, ALL))

    def open(
        self,
        path: Path,
        precision: str,
        threads: int,
        variant: Variant = PLAIN,
        settings: Settings = NO_SETTINGS,
    ) -> ExecutorchSession:
        """Load the program."""
        return ExecutorchSession(_file(path, settings.get(SETTING, MATRICES)), threads)


def _file(folder: Path, delegated: str) -> Path:
    return folder / f"{delegated}.pte"


PEER = Executorch()
