"""GPT-2 as a PyTorch module, for float and for INT8 artifacts, and a session with a KV cache.

    B batch, T time, C channels, H heads, D head size, V vocabulary, S cache length

The structure is the same for every artifact; which class a layer has comes from the artifact.
"""

import torch
from jaxgpt.shared.architecture import LAYER_NORM_EPSILON
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.errors import UserError
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn import functional as F

from jaxgpt_export.format.rotary import rope_table
from jaxgpt_export.model.kv_cache import KVCache


class Attention(nn.Module):
    """Causal multi-head self-attention; c_attn and c_proj are float or INT8 layers."""

    def __init__(
        self,
        n_head: int,
        c_attn: nn.Module,
        c_proj: nn.Module,
        rope: Tensor | None = None,
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.n_head = n_head
        self._exact = exact
        self._rope = rope  # (2, block_size, D), see format/rotary.py
        self.c_attn = c_attn
        self.c_proj = c_proj

    def forward(
        self, x: Float[Tensor, "B T C"], cache: KVCache | None = None, layer: int = 0
    ) -> Float[Tensor, "B T C"]:
        """Attend to the tokens up to each position, those in the cache included."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # (B, H, T, D)
        mask = None
        start = 0 if cache is None else cache.length
        if self._rope is not None:
            cosine, sine = (part.narrow(0, start, T) for part in self._rope)
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
        self, x: Float[Tensor, "B T C"], cache: KVCache | None = None, layer: int = 0
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
        rope = None if self.wpe is not None else torch.from_numpy(rope_table(config))
        self.h = nn.ModuleList()
        for index in range(config.n_layer):
            name = f"h.{index}"
            linear = (layers[f"{name}.attn.c_attn"], layers[f"{name}.attn.c_proj"])
            attn = Attention(config.n_head, *linear, rope, exact)
            mlp = MLP(layers[f"{name}.mlp.c_fc"], layers[f"{name}.mlp.c_proj"], exact)
            self.h.append(Block(config.n_embd, attn, mlp, exact))
        self.ln_f = layer_norm(config.n_embd, exact)
        self.lm_head = layers["lm_head"]

    def forward(
        self, tokens: Integer[Tensor, "B T"], cache: KVCache | None = None, last_only: bool = False
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

    def new_cache(self, batch: int = 1, rounded_to: torch.dtype = torch.float32) -> KVCache:
        """Return an empty cache that this model multiplies as it lies."""
        dtype = torch.float64 if self.exact else torch.float32
        return KVCache(self.config, batch, rounded_to, dtype)
