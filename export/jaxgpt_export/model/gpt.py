"""GPT-2 as a PyTorch module, for float and for INT8 artifacts, and a session with a KV cache.

    B batch, T time, C channels, H heads, D head size, V vocabulary, S cache length

The structure is the same for every artifact; which class a layer has comes from the artifact.
"""

import torch
from jaxgpt.shared.config import ROTARY_BASE, ModelConfig
from jaxgpt.shared.errors import UserError
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn import functional as F

from jaxgpt_export.model.kv_cache import Cache

LAYER_NORM_EPSILON = 1e-5
EMBEDDINGS = ("wte", "wpe")
PARTS = ("weight", "bias")


class Attention(nn.Module):
    """Causal multi-head self-attention; c_attn and c_proj are float or INT8 layers."""

    def __init__(
        self,
        n_head: int,
        c_attn: nn.Module,
        c_proj: nn.Module,
        turns: Tensor | None = None,
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.n_head = n_head
        self._exact = exact
        self._turns = turns  # (2, block_size, D), cosines and sines of rotary positions
        self.c_attn = c_attn
        self.c_proj = c_proj

    def forward(
        self, x: Float[Tensor, "B T C"], cache: Cache | None = None, layer: int = 0
    ) -> Float[Tensor, "B T C"]:
        """Attend to the tokens up to each position, those in the cache included."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # (B, H, T, D)
        mask = None
        start = 0 if cache is None else cache.length
        if self._turns is not None:
            cosine, sine = (part.narrow(0, start, T) for part in self._turns)
            query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        if cache is not None:
            key, value = cache.extended(layer, key, value)
            if start and T > 1:
                mask = torch.ones(T, start + T, dtype=torch.bool).tril(start)
        # Without a cache always, whatever T: so that a torch.export program may leave T open.
        causal = mask is None and (cache is None or T > 1)
        if self._exact:
            query, key, value = query.double(), key.double(), value.double()
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        return self.c_proj(mixed.to(x.dtype).transpose(1, 2).reshape(B, T, C))


def rotary_turns(config: ModelConfig) -> Float[Tensor, "2 S D"]:
    """Return cosine and sine of every position and channel; see `jaxgpt.training.model.attention.rotate`."""
    half = config.head_size // 2
    speeds = ROTARY_BASE ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = torch.arange(config.block_size, dtype=torch.float32)[:, None] * speeds.repeat(2)[None]
    return torch.stack([angles.cos(), angles.sin()])


def rotate(
    x: Float[Tensor, "B H T D"], cosine: Float[Tensor, "T D"], sine: Float[Tensor, "T D"]
) -> Float[Tensor, "B H T D"]:
    """Turn each pair of channels (i, i + D/2) by its angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


class MLP(nn.Module):
    """Two linear layers with GELU (tanh) between them."""

    def __init__(self, c_fc: nn.Module, c_proj: nn.Module, exact: bool = False) -> None:
        super().__init__()
        self.c_fc = c_fc
        self.c_proj = c_proj
        self._exact = exact

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        """Apply both layers."""
        hidden = self.c_fc(x)
        wide = hidden.double() if self._exact else hidden
        return self.c_proj(F.gelu(wide, approximate="tanh").to(x.dtype))


class ExactLayerNorm(nn.LayerNorm):
    """The same, computed in float64 and rounded once."""

    def forward(self, x: Float[Tensor, "*N C"]) -> Float[Tensor, "*N C"]:
        """Normalize."""
        gain, bias = self.weight.double(), self.bias.double()
        return F.layer_norm(x.double(), self.normalized_shape, gain, bias, self.eps).to(x.dtype)


def layer_norm(channels: int, exact: bool) -> nn.LayerNorm:
    """Return a LayerNorm as GPT-2 has it."""
    return (ExactLayerNorm if exact else nn.LayerNorm)(channels, eps=LAYER_NORM_EPSILON)


class Block(nn.Module):
    """Attention and MLP, each on a normalized input and added to the stream."""

    def __init__(self, channels: int, attn: Attention, mlp: MLP, exact: bool = False) -> None:
        super().__init__()
        self.ln_1 = layer_norm(channels, exact)
        self.attn = attn
        self.ln_2 = layer_norm(channels, exact)
        self.mlp = mlp

    def forward(
        self, x: Float[Tensor, "B T C"], cache: Cache | None = None, layer: int = 0
    ) -> Float[Tensor, "B T C"]:
        """Return the new stream."""
        x = x + self.attn(self.ln_1(x), cache, layer)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2; `model(tokens)` gives logits.

    Args:
      config: shape.
      layers: every embedding and linear layer by its GPT-2 name (wte, wpe, h.0.attn.c_attn, ...,
        lm_head), of whatever class; no wpe where positions are rotary.
      exact: norms, attention and GELU are computed in float64 and rounded once, as `model.arithmetic`
        says of models whose inputs are rounded to 8 bits.
    """

    def __init__(self, config: ModelConfig, layers: dict[str, nn.Module], exact: bool = False) -> None:
        super().__init__()
        self.config = config
        self.exact = exact
        self.wte = layers["wte"]
        self.wpe = layers.get("wpe")
        turns = None if self.wpe is not None else rotary_turns(config)
        self.h = nn.ModuleList()
        for index in range(config.n_layer):
            name = f"h.{index}"
            linear = (layers[f"{name}.attn.c_attn"], layers[f"{name}.attn.c_proj"])
            attn = Attention(config.n_head, *linear, turns, exact)
            mlp = MLP(layers[f"{name}.mlp.c_fc"], layers[f"{name}.mlp.c_proj"], exact)
            self.h.append(Block(config.n_embd, attn, mlp, exact))
        self.ln_f = layer_norm(config.n_embd, exact)
        self.lm_head = layers["lm_head"]

    def forward(
        self, tokens: Integer[Tensor, "B T"], cache: Cache | None = None, last_only: bool = False
    ) -> Float[Tensor, "B T2 V"]:
        """Return the logits of the next token at every position.

        Args:
          tokens: ids in [0, V); with those in the cache at most block_size.
          cache: tokens that came before; it takes these in.
          last_only: logits of the last position only, T2 = 1 (else T2 = T).

        Raises:
          UserError: more tokens than the context holds.
        """
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.config.block_size:
            raise UserError(f"{end} tokens were given, the model's context holds {self.config.block_size}")
        x = self.wte(tokens)
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(start, end, device=tokens.device))
        for layer, block in enumerate(self.h):
            x = block(x, cache, layer)
        if cache is not None:
            cache.length = end
        return self.lm_head(self.ln_f(x[:, -1:] if last_only else x))

    def new_cache(self, batch: int = 1, rounded_to: torch.dtype = torch.float32) -> Cache:
        """Return an empty cache that this model multiplies as it lies."""
        dtype = torch.float64 if self.exact else torch.float32
        return Cache(self.config, batch, rounded_to, dtype)


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return (O, I) of every matrix by layer name; (V, C) and (block_size, C) of the embeddings.

    A tied head is not among them.
    """
    C = config.n_embd
    shapes = {"wte": (config.vocab_size, C)}
    if config.positions == "learned":
        shapes["wpe"] = (config.block_size, C)
    for index in range(config.n_layer):
        shapes[f"h.{index}.attn.c_attn"] = (3 * C, C)
        shapes[f"h.{index}.attn.c_proj"] = (C, C)
        shapes[f"h.{index}.mlp.c_fc"] = (4 * C, C)
        shapes[f"h.{index}.mlp.c_proj"] = (C, 4 * C)
    if not config.tied:
        shapes["lm_head"] = (config.vocab_size, C)
    return shapes


def norm_names(config: ModelConfig) -> list[str]:
    """Return the names of the LayerNorms."""
    return [*(f"h.{i}.{norm}" for i in range(config.n_layer) for norm in ("ln_1", "ln_2")), "ln_f"]


def float_model(config: ModelConfig, tensors: dict[str, Tensor]) -> GPT:
    """Build the float32 module.

    Args:
      config: shape.
      tensors: by module name: "wte.weight", "h.0.attn.c_attn.weight" (O, I), ".bias", "ln_f.weight", ...
    """
    layers: dict[str, nn.Module] = {}
    for name in layer_shapes(config):
        weight = tensors[f"{name}.weight"]
        if name in EMBEDDINGS:
            layers[name] = nn.Embedding.from_pretrained(weight)
        else:
            layers[name] = float_linear(weight, tensors.get(f"{name}.bias"))
    if config.tied:
        layers["lm_head"] = float_linear(tensors["wte.weight"], None)
        layers["lm_head"].weight = layers["wte"].weight
    model = GPT(config, layers)
    norms = {f"{name}.{part}": tensors[f"{name}.{part}"] for name in norm_names(config) for part in PARTS}
    model.load_state_dict(norms, strict=False)
    return model.eval().requires_grad_(False)


def float_linear(weight: Float[Tensor, "O I"], bias: Float[Tensor, "O"] | None) -> nn.Linear:
    """Return a float32 layer that holds these very tensors."""
    O, I = weight.shape
    layer = nn.Linear(I, O, bias=bias is not None, device="meta")
    layer.load_state_dict(
        {"weight": weight} if bias is None else {"weight": weight, "bias": bias}, assign=True
    )
    return layer.requires_grad_(False)
