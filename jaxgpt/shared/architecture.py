"""GPT-2 as one table: every layer and parameter of a configuration, with its role, shape and names elsewhere.

Everything that walks over a model's parameters reads this table: the optimizer's groups, the converter, the
quantizer, the engine's binding, importers and exporters. Apart stay, on purpose, the two forward passes, and
the models that this project is measured against.

    layer            O     I    its input is made by   Flax       Hugging Face, nanoGPT  GGUF
    wte              V     C                           embedding  wte                    token_embd
    wpe              S     C                           embedding  wpe                    position_embd
    h.N.ln_1               C                           scale      h.N.ln_1               blk.N.attn_norm
    h.N.attn.c_attn  3 C   C    h.N.ln_1               kernel     h.N.attn.c_attn        blk.N.attn_qkv
    h.N.attn.c_proj  C     C    the values of c_attn   kernel     h.N.attn.c_proj        blk.N.attn_output
    h.N.ln_2               C                           scale      h.N.ln_2               blk.N.ffn_norm
    h.N.mlp.c_fc     4 C   C    h.N.ln_2               kernel     h.N.mlp.c_fc           blk.N.ffn_up
    h.N.mlp.c_proj   C     4 C  (a GELU lies between)  kernel     h.N.mlp.c_proj         blk.N.ffn_down
    ln_f                   C                           scale      ln_f                   output_norm
    lm_head          V     C    ln_f                   embedding  lm_head                output

V vocabulary, S positions, C channels. A module's matrices are (O, I); so are nanoGPT's and GGUF's. Flax
kernels, and the Conv1D layers that a block has at Hugging Face, are (I, O). A tied head has no matrix of its
own: it is wte. Rotary positions have no wpe. Standard library only.
"""

import dataclasses
import functools
import math
from typing import Literal

from jaxgpt.shared.config import ModelConfig

Role = Literal["embedding", "linear", "norm"]
Group = Literal["matrix", "embedding", "vector"]
Part = Literal["weight", "bias"]

HEAD = "lm_head"
PARTS: tuple[Part, Part] = ("weight", "bias")
LAYER_NORM_EPSILON = 1e-5
HF_PREFIX = "transformer."  # before every name but the head's


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockLayer:
    """A layer of a block, whatever the block's number.

    Attributes:
      name: in the block.
      role: what it is.
      outputs: O, in multiples of C.
      inputs: I, in multiples of C.
      norm: the LayerNorm whose output is its input; None where something else makes it.
      values: the layer whose last C outputs (the values) attention mixes into its input; None for none.
      gguf: its name in the block there.
    """

    name: str
    role: Role
    outputs: int = 1
    inputs: int = 1
    norm: str | None = None
    values: str | None = None
    gguf: str


# In the order of the computation.
BLOCK: tuple[BlockLayer, ...] = (
    BlockLayer(name="ln_1", role="norm", gguf="attn_norm"),
    BlockLayer(name="attn.c_attn", role="linear", outputs=3, norm="ln_1", gguf="attn_qkv"),
    BlockLayer(name="attn.c_proj", role="linear", values="attn.c_attn", gguf="attn_output"),
    BlockLayer(name="ln_2", role="norm", gguf="ffn_norm"),
    BlockLayer(name="mlp.c_fc", role="linear", outputs=4, norm="ln_2", gguf="ffn_up"),
    BlockLayer(name="mlp.c_proj", role="linear", inputs=4, gguf="ffn_down"),
)
BLOCK_LINEARS = tuple(layer.name for layer in BLOCK if layer.role == "linear")
BLOCK_NORMS = tuple(layer.name for layer in BLOCK if layer.role == "norm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer of a model.

    Attributes:
      name: GPT-2's, such as "h.0.attn.c_attn".
      role: what it is; the head is a linear layer.
      block: number of its block; None outside.
      name_in_block: its name there; "" outside.
      outputs: O; rows of an embedding.
      inputs: I; C for a LayerNorm.
      norm: name of the LayerNorm whose output is its input; None where something else makes it.
      values: name of the layer whose last C outputs attention mixes into its input; None for none.
      bias: whether it has one.
      tied_to: the layer whose matrix it multiplies with, having none of its own; None for its own.
      gguf: its name there.
    """

    name: str
    role: Role
    block: int | None = None
    name_in_block: str = ""
    outputs: int
    inputs: int
    norm: str | None = None
    values: str | None = None
    bias: bool = False
    tied_to: str | None = None
    gguf: str

    @property
    def matrix(self) -> str:
        """Name of the layer whose matrix it multiplies with: its own, or that of a tied head."""
        return self.tied_to or self.name

    @property
    def shape(self) -> tuple[int, ...]:
        """(O, I) of its matrix, or (C,) of a LayerNorm."""
        return (self.inputs,) if self.role == "norm" else (self.outputs, self.inputs)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a model, with its names and layouts.

    Attributes:
      layer: that has it.
      part: weight (a LayerNorm's gain) or bias.
    """

    layer: Layer
    part: Part

    @property
    def name(self) -> str:
        """Name in the PyTorch module: "h.0.attn.c_attn.weight"."""
        return f"{self.layer.name}.{self.part}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the PyTorch module, in nanoGPT and in GGUF: (O, I), (O,), or (C,)."""
        if self.part == "bias":
            return (self.layer.inputs if self.layer.role == "norm" else self.layer.outputs,)
        return self.layer.shape

    @property
    def group(self) -> Group:
        """What optimizers distinguish: a block's matrix, a table with a row a token or position, a vector."""
        if len(self.shape) == 1:
            return "vector"
        return "embedding" if self.layer.block is None else "matrix"

    @property
    def transposed(self) -> bool:
        """Whether Flax and Hugging Face store it (I, O)."""
        return self.group == "matrix"

    @property
    def flax_name(self) -> str:
        """Name among the Flax parameters: "h.0.attn.c_attn.kernel"."""
        if self.part == "bias":
            return self.name
        leaf = {"matrix": "kernel", "embedding": "embedding", "vector": "scale"}[self.group]
        return f"{self.layer.name}.{leaf}"

    @property
    def hf_name(self) -> str:
        """Name in a Hugging Face GPT-2 file: "transformer.h.0.attn.c_attn.weight"."""
        return self.name if self.layer.name == HEAD else HF_PREFIX + self.name

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape there, and among the Flax parameters."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def gguf_name(self) -> str:
        """Name in a GGUF file: "blk.0.attn_qkv.weight"."""
        return f"{self.layer.gguf}.{self.part}"


@functools.lru_cache(maxsize=32)
def layers(config: ModelConfig) -> tuple[Layer, ...]:
    """Return every layer in the order of the computation; a tied head too, though it has no matrix."""
    C = config.n_embd
    found = [Layer(name="wte", role="embedding", outputs=config.vocab_size, inputs=C, gguf="token_embd")]
    if config.positions == "learned":
        wpe = Layer(name="wpe", role="embedding", outputs=config.block_size, inputs=C, gguf="position_embd")
        found.append(wpe)
    for number in range(config.n_layer):
        found += [_in_block(layer, number, C) for layer in BLOCK]
    found.append(Layer(name="ln_f", role="norm", outputs=C, inputs=C, bias=True, gguf="output_norm"))
    tied_to = "wte" if config.tied else None
    head = Layer(
        name=HEAD,
        role="linear",
        outputs=config.vocab_size,
        inputs=C,
        norm="ln_f",
        tied_to=tied_to,
        gguf="output",
    )
    return (*found, head)


def _in_block(layer: BlockLayer, number: int, channels: int) -> Layer:
    block = f"h.{number}"
    return Layer(
        name=f"{block}.{layer.name}",
        role=layer.role,
        block=number,
        name_in_block=layer.name,
        outputs=layer.outputs * channels,
        inputs=layer.inputs * channels,
        norm=layer.norm and f"{block}.{layer.norm}",
        values=layer.values and f"{block}.{layer.values}",
        bias=True,
        gguf=f"blk.{number}.{layer.gguf}",
    )


def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """Return every parameter in the order of the computation, without the scales of fake quantization."""
    return tuple(
        Parameter(layer, part)
        for layer in layers(config)
        if layer.tied_to is None
        for part in PARTS
        if part == "weight" or layer.bias
    )


def matrices(config: ModelConfig) -> dict[str, Layer]:
    """Return the layers that have a matrix of their own, by name: embeddings and linear layers."""
    return {layer.name: layer for layer in layers(config) if layer.role != "norm" and layer.tied_to is None}


def linear_layers(config: ModelConfig) -> dict[str, Layer]:
    """Return the linear layers by name, the head included."""
    return {layer.name: layer for layer in layers(config) if layer.role == "linear"}


def norms(config: ModelConfig) -> dict[str, Layer]:
    """Return the LayerNorms by name."""
    return {layer.name: layer for layer in layers(config) if layer.role == "norm"}


def flops_per_token(config: ModelConfig) -> float:
    """Return the floating point operations of training on one token.

    6 for each parameter that takes part in a product (an embedding that is only looked up does not), and
    12 * layers * channels * context for attention (the whole square, as is usual, though half of it is
    masked).

    Source: Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B.
    """
    multiplied = {layer.matrix for layer in linear_layers(config).values()} | norms(config).keys()
    used = sum(math.prod(each.shape) for each in parameters(config) if each.layer.name in multiplied)
    return 6.0 * used + 12.0 * config.n_layer * config.n_embd * config.block_size
