"""The loss: cross entropy of the head's logits, whose gradient is formed while they are at hand."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxgpt.training.model.gpt import GPT, logits_of
from jaxgpt.training.model.numerics import Numerics, matmul
from jaxgpt.training.model.params import Params, merge


class HeadSettings(NamedTuple):
    """What the loss needs to know of the head.

    Attributes:
      vocab_size: V; the table may have more rows.
      numerics: of the product.
      chunks: pieces of the positions whose logits exist one after the other.
    """

    vocab_size: int
    numerics: Numerics
    chunks: int


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def head_loss(
    head: HeadSettings,
    x: Float[Array, "B T C"],
    table: Float[Array, "V2 C"],
    targets: Int[Array, "B T"],
    factor: Float[Array, ""],
) -> Float[Array, ""]:
    """Sum the cross entropy of the head's logits over the positions whose target is not negative.

    Differentiated, the gradient of each chunk is computed while its logits are at hand, so that they are
    neither kept nor computed again: one product less than rematerialization takes, and less memory.

    Args:
      head: sizes and numerics.
      x: features.
      table: rows of the head, one a token.
      targets: the tokens that follow.
      factor: what the loss will be multiplied by: gradients in float16 are formed with it. It has no
        gradient itself.

    Source: Hsu et al. 2024, Liger Kernel, arXiv:2410.10989 (fused linear cross entropy).
    """

    def chunk(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        features, wanted = part
        logits = logits_of(features, table, head.vocab_size, head.numerics)
        return total + _cross_entropy(logits, wanted, table.dtype)[0], None

    return _over_chunks(chunk, _like(x, (), table.dtype), x, targets, head.chunks)[0]


def _head_loss_forward(
    head: HeadSettings, x: Array, table: Array, targets: Array, factor: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    numerics, dtype = head.numerics, table.dtype
    operand = table.astype(numerics.compute)  # once, not for each chunk

    def chunk(carry: tuple[Array, Array], part: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        (total, table_gradient), (features, wanted) = carry, part
        logits = logits_of(features, operand, head.vocab_size, numerics, numerics.logits)
        loss, gradient = _cross_entropy(logits, wanted, dtype)
        gradient = gradient * factor
        of_features = matmul("NV,VC->NC", gradient, operand, numerics, x.dtype)
        of_table = matmul("NV,NC->VC", gradient, features, numerics, dtype)
        return (total + loss, table_gradient + of_table), of_features

    start = (_like(x, (), dtype), _like(x, table.shape, dtype))
    (loss, table_gradient), x_gradient = _over_chunks(chunk, start, x, targets, head.chunks)
    return loss, (x_gradient, table_gradient, factor)


def _head_loss_backward(
    head: HeadSettings, kept: tuple[Array, Array, Array], gradient: Array
) -> tuple[Array, Array, None, None]:
    x_gradient, table_gradient, factor = kept
    ratio = gradient / factor  # 1 where the caller multiplies by what it said
    return (x_gradient * ratio).astype(x_gradient.dtype), table_gradient * ratio, None, None


head_loss.defvjp(_head_loss_forward, _head_loss_backward)


def _cross_entropy(
    logits: Float[Array, "N V2"], targets: Int[Array, "N"], dtype: Any
) -> tuple[Float[Array, ""], Float[Array, "N V2"]]:
    """Return the summed loss and its gradient: softmax - one-hot where a target counts; both in a dtype."""
    counted = targets >= 0
    largest = jnp.max(logits, axis=-1, keepdims=True).astype(dtype)
    powers = jnp.exp(logits.astype(dtype) - largest)
    total = jnp.sum(powers, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1).astype(dtype)
    losses = jnp.where(counted[:, None], jnp.log(total) + largest - chosen, 0.0)
    hits = jnp.arange(logits.shape[-1])[None] == targets[:, None]
    gradient = powers * (counted[:, None] / total) - hits.astype(dtype)  # no hit where it is < 0
    return jnp.sum(losses), gradient


def _over_chunks(
    body: Callable[..., Any], start: Any, x: Array, targets: Array, chunks: int
) -> tuple[Any, Any]:
    """Scan over pieces of the positions; return the carry and what came out, in x's shape, if anything."""
    N = targets.size
    pieces = next(n for n in range(min(chunks, N), 0, -1) if N % n == 0)
    parts = (x.reshape(pieces, N // pieces, -1), targets.reshape(pieces, N // pieces))
    if pieces == 1:
        carry, out = body(start, (parts[0][0], parts[1][0]))
    else:
        carry, out = jax.lax.scan(body, start, parts)
    return carry, None if out is None else out.reshape(x.shape)


def _like(x: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Return zeros of another shape and dtype that vary over devices as x does."""
    return jnp.broadcast_to(jnp.sum(x[:0], dtype=dtype), shape)


def summed_loss(
    graph: nnx.GraphDef[GPT],
    params: Params,
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    keys: jax.Array | None = None,
    *,
    chunks: int = 1,
    remat: bool = False,
    factor: Float[Array, ""] | float = 1.0,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Cross entropy over the positions whose target is not negative.

    Args:
      graph: structure of the model.
      params: its parameters.
      inputs: tokens.
      targets: the tokens that follow; negative ones do not count.
      keys: (B,), for dropout.
      chunks: pieces of the positions whose logits exist one after the other; rounded down to a divisor.
      remat: compute the blocks again in the backward pass.
      factor: what the loss will be multiplied by before it is differentiated; see head_loss.

    Returns:
      The sum in nats, and the number of positions.
    """
    model = merge(graph, params)
    x, table = model.head_operands(model.features(inputs, keys, remat))
    head = HeadSettings(model.vocab_size, model.numerics, chunks)
    loss = head_loss(head, x, table, targets, jnp.asarray(factor, table.dtype))
    return loss, jnp.sum(targets >= 0, dtype=jnp.int32)
