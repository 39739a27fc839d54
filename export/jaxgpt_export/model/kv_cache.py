"""Keys and values of the tokens so far."""

import torch
from jaxgpt.shared.config import ModelConfig
from jaxtyping import Float
from torch import Tensor


class KVCache:
    """Keys and values of the tokens so far.

    Args:
      config: shape.
      batch: texts side by side.
      rounded_to: what keys and values are rounded to: torch.float32 (not at all) or torch.float16.
      dtype: what they lie in: an exact model multiplies float64, and would convert all of them for each
        token.

    Attributes:
      keys: (B, H, S, D) of each layer.
      values: (B, H, S, D) of each layer.
      length: number of tokens in it.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        rounded_to: torch.dtype = torch.float32,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.n_layer, batch, config.n_head, config.block_size, config.head_size)
        self.keys = torch.zeros(shape, dtype=dtype).unbind()
        self.values = torch.zeros(shape, dtype=dtype).unbind()
        self.length = 0
        self._rounded_to = rounded_to

    def extended(
        self, layer: int, key: Float[Tensor, "B H T D"], value: Float[Tensor, "B H T D"]
    ) -> tuple[Float[Tensor, "B H S D"], Float[Tensor, "B H S D"]]:
        """Put a layer's new keys and values behind the others; return all of them."""
        start, T = self.length, key.shape[2]
        for kept, new in ((self.keys[layer], key), (self.values[layer], value)):
            kept.narrow(2, start, T).copy_(new.to(self._rounded_to))
        return self.keys[layer].narrow(2, 0, start + T), self.values[layer].narrow(2, 0, start + T)
