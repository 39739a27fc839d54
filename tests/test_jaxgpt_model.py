import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgpt.shared.config import ModelConfig
from jaxgpt.training.model.attention import Attention
from jaxgpt.training.model.gpt import empty_cache
from jaxgpt.training.model.layers import dropout
from jaxgpt.training.model.loss import summed_loss
from jaxgpt.training.model.numerics import FLOAT32
from jaxgpt.training.model.params import Params, graph_of, init_params, merge, pad_vocabulary, trim_vocabulary

CONFIG = ModelConfig(vocab_size=97, block_size=24, n_layer=3, n_head=4, n_embd=32)
# float32 with sums in another order; logits here are of size 1 to 30 and differ by 1e-6 to 1e-5.
FLOAT32_TOLERANCE = 1e-4


def random_params(config: ModelConfig, seed: int = 0) -> Params:
    """Parameters that are all non-zero and large enough for every path to matter."""
    random = np.random.default_rng(seed)
    return {
        name: jnp.asarray(random.normal(size=leaf.shape, scale=0.3) + name.endswith("scale"), jnp.float32)
        for name, leaf in init_params(config, 0).items()
    }


def logits(params: Params, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(merge(graph_of(CONFIG), params)(jnp.asarray(tokens)))


@pytest.mark.parametrize("length", [1, 7, 24])
def test_logits_equal_transformers_on_random_parameters(length: int) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    params = random_params(CONFIG)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=97,
            n_positions=24,
            n_layer=3,
            n_head=4,
            n_embd=32,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ).eval()
    leaves = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
    state = {}
    for name, array in params.items():
        stem, _, leaf = name.rpartition(".")
        state[f"transformer.{stem}.{leaves[leaf]}"] = torch.from_numpy(np.array(array))
    state["lm_head.weight"] = state["transformer.wte.weight"]
    theirs.load_state_dict(state, strict=True)
    tokens = np.random.default_rng(1).integers(97, size=(2, length))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(logits(params, tokens) - expected).max() <= FLOAT32_TOLERANCE


def test_changing_a_token_leaves_earlier_logits_unchanged_and_later_ones_not() -> None:
    params = random_params(CONFIG)
    tokens = np.random.default_rng(1).integers(97, size=(1, 24))
    before = logits(params, tokens)
    tokens[0, 10] = (tokens[0, 10] + 1) % 97
    after = logits(params, tokens)
    assert (before[0, :10] == after[0, :10]).all()
    assert (np.abs(before[0, 10:] - after[0, 10:]).max(axis=-1) > 1e-3).all()


def test_no_gradient_flows_from_a_logit_to_later_positions() -> None:
    params, graph = random_params(CONFIG), graph_of(CONFIG)
    tokens = jnp.arange(24)[None] % 97

    def middle(positions: jax.Array) -> jax.Array:
        return merge(graph, {**params, "wpe.embedding": positions})(tokens)[0, 9].sum()

    grads = np.abs(np.asarray(jax.grad(middle)(params["wpe.embedding"]))).sum(axis=1)
    assert (grads[10:] == 0).all()
    assert (grads[:10] > 0).all()


@pytest.mark.parametrize("first", [1, 5, 23])
def test_cache_gives_the_logits_of_the_whole_text(first: int) -> None:
    params, graph = random_params(CONFIG), graph_of(CONFIG)
    tokens = np.random.default_rng(2).integers(97, size=(2, 24))
    model = merge(graph, params)
    part, cache = model.with_cache(jnp.asarray(tokens[:, :first]), empty_cache(CONFIG, 2))
    parts = [part]
    for position in range(first, 24):
        part, cache = model.with_cache(jnp.asarray(tokens[:, position : position + 1]), cache)
        parts.append(part)
    assert np.abs(np.concatenate(parts, axis=1) - logits(params, tokens)).max() <= FLOAT32_TOLERANCE
    assert int(cache.length) == 24


def test_dropout_keeps_the_mean_and_is_off_without_a_key() -> None:
    x = jnp.ones((200, 200))
    dropped = dropout(x, 0.25, jax.random.split(jax.random.key(0), 200))
    # 40,000 draws: the mean's standard deviation is 0.003.
    assert abs(float(dropped.mean()) - 1.0) < 0.012
    assert set(np.unique(np.asarray(dropped)).tolist()) == {0.0, float(np.float32(1 / 0.75))}
    assert (dropout(x, 0.25, None) == x).all()


def test_dropout_changes_logits_only_with_a_key() -> None:
    config = dataclasses.replace(CONFIG, dropout=0.5)
    model = merge(graph_of(config), random_params(config))
    tokens = jnp.arange(24)[None]
    assert (model(tokens) == model(tokens)).all()
    assert not (
        model(tokens, jax.random.split(jax.random.key(0), 1))
        == model(tokens, jax.random.split(jax.random.key(1), 1))
    ).all()


def test_attention_weights_are_dropped_by_their_own_rate() -> None:
    x, keys = (
        jax.random.normal(jax.random.key(0), (2, 24, CONFIG.n_embd)),
        jax.random.split(jax.random.key(1), 2),
    )

    def outputs(**rates: float) -> tuple[jax.Array, jax.Array]:
        attention = Attention(dataclasses.replace(CONFIG, **rates), FLOAT32, nnx.Rngs(0))
        return attention(x), attention(x, keys)

    plain, dropped = outputs(dropout=0.5, attn_dropout=0.0)
    assert 0.4 < (dropped == 0).mean() < 0.6
    assert (dropped == jnp.where(dropped == 0, 0, 2 * plain)).all()  # of what attention adds, half; no weight
    plain, dropped = outputs(attn_dropout=0.5)
    assert (dropped != plain).mean() > 0.9
    assert (dropped != 0).all()
    assert (outputs(dropout=0.5, attn_dropout=0.5)[1] == outputs(dropout=0.5)[1]).all()


def test_initial_loss_is_that_of_a_uniform_guess() -> None:
    config = ModelConfig(512, 64, 4, 4, 64)
    tokens = jnp.asarray(np.random.default_rng(0).integers(512, size=(4, 64)))
    log_p = jax.nn.log_softmax(merge(graph_of(config), init_params(config, 0))(tokens))
    loss = -float(jnp.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], axis=-1).mean())
    assert abs(loss - np.log(512)) < 0.1


def test_initial_weights_are_normal_with_the_standard_deviations_of_gpt_2() -> None:
    """Projections into the residual stream have less, or its variance would grow with the layers."""
    config = ModelConfig(2000, 64, 4, 4, 128, tied=False)
    residual_std = 0.02 / np.sqrt(2 * config.n_layer)
    checked = 0
    for name, array in init_params(config, 0).items():
        values = np.asarray(array, np.float64)
        if not name.endswith((".kernel", ".embedding")):
            assert (values == float(name.endswith(".scale"))).all(), name
            continue
        std = residual_std if name.endswith("c_proj.kernel") else 0.02
        # The standard deviation of n numbers is off by 1 / sqrt(2 n), relative: 0.8% for the 8,192 of the
        # smallest table, the positions'; the bound is nearly four times that.
        assert values.std() == pytest.approx(std, rel=0.03), name
        assert abs(values.mean()) < 5 * std / np.sqrt(values.size), name
        checked += 1
    assert checked == 3 + 4 * config.n_layer  # tokens, positions, head; four matrices a block


def test_a_padded_token_table_changes_neither_loss_nor_gradient_nor_what_is_drawn() -> None:
    params = random_params(CONFIG)
    padded = pad_vocabulary(params, 64)
    assert padded["wte.embedding"].shape == (128, 32)
    tokens = jnp.asarray(np.random.default_rng(1).integers(97, size=(2, 25)))

    def loss(params: Params) -> jax.Array:
        return summed_loss(graph_of(CONFIG), params, tokens[:, :-1], tokens[:, 1:])[0]

    (plain, grads), (other, padded_grads) = jax.value_and_grad(loss)(params), jax.value_and_grad(loss)(padded)
    assert abs(float(plain) - float(other)) <= 1e-6 * float(plain)
    assert not np.asarray(padded_grads["wte.embedding"][97:]).any()
    trimmed = trim_vocabulary(padded_grads, 97)
    for name, grad in grads.items():
        scale = float(jnp.abs(grad).max())
        assert np.abs(np.asarray(grad - trimmed[name])).max() <= 1e-5 * scale, name
    out = merge(graph_of(CONFIG), padded)(tokens[:, :24])
    assert np.asarray(jax.nn.softmax(out)[..., 97:]).max() == 0.0
