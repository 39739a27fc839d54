import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxgpt.training.optimizers
from jaxgpt.shared.config import ModelConfig, TrainConfig
from jaxgpt.shared.errors import UserError
from jaxgpt.training.devices.mesh import make_mesh
from jaxgpt.training.lr_schedule import schedule
from jaxgpt.training.model.numerics import FLOAT32
from jaxgpt.training.model.params import abstract_params
from jaxgpt.training.optimizers import find_optimizer
from jaxgpt.training.step.compiled import CompiledTraining
from jaxgpt.training.step.optimizer import make_optimizer

MODEL = ModelConfig(vocab_size=16, block_size=4, n_layer=1, n_head=1, n_embd=8)
QAT = dataclasses.replace(MODEL, qat=True)

CONFIG = TrainConfig(
    max_steps=100,
    learning_rate=0.1,
    embedding_learning_rate=0.02,
    warmup_steps=10,
    weight_decay=0.3,
    grad_clip=1e9,
)
PARAMS = {
    "h.0.attn.c_attn.kernel": np.random.default_rng(0).normal(size=(8, 24)),
    "wte.embedding": np.random.default_rng(1).normal(size=(16, 8)),
    "h.0.attn.c_attn.bias": np.random.default_rng(2).normal(size=(24,)),
    "ln_f.scale": np.random.default_rng(3).normal(size=(8,)),
}


def updates(config: TrainConfig, grads: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The parameters after as many steps as there are gradients, in float64."""
    with jax.enable_x64(True):
        params = {name: jnp.asarray(value, jnp.float64) for name, value in PARAMS.items()}
        optimizer = make_optimizer(config, MODEL)
        state = optimizer.init(params)
        for grad in grads:
            update, state = optimizer.update({n: jnp.asarray(g) for n, g in grad.items()}, state, params)
            params = optax.apply_updates(params, update)
        return {name: np.asarray(value) for name, value in params.items()}


def gradients(steps: int) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(5)
    return [{name: random.normal(size=value.shape) for name, value in PARAMS.items()} for _ in range(steps)]


def test_adamw_follows_its_formula_and_decays_matrices_only() -> None:
    grads = gradients(5)
    found = updates(CONFIG, grads)
    for name, start in PARAMS.items():
        rate = schedule(CONFIG, 0.1 if name.endswith("kernel") else 0.02)
        decay = 0.3 if name.endswith(("kernel", "embedding")) else 0.0
        w, m, v = start.copy(), np.zeros_like(start), np.zeros_like(start)
        for t, grad in enumerate(grads, 1):
            m = CONFIG.beta1 * m + (1 - CONFIG.beta1) * grad[name]
            v = CONFIG.beta2 * v + (1 - CONFIG.beta2) * grad[name] ** 2
            step = m / (1 - CONFIG.beta1**t) / (np.sqrt(v / (1 - CONFIG.beta2**t)) + 1e-8)
            w = w - float(rate(t - 1)) * (step + decay * w)
        # The schedule is computed in float32 by Optax: 1e-7 of a rate of 0.1 in 5 steps.
        assert np.abs(found[name] - w).max() < 1e-7


def test_muon_moves_kernels_by_nearly_orthogonal_matrices() -> None:
    config = dataclasses.replace(CONFIG, optimizer="muon", weight_decay=0.0, warmup_steps=0)
    found = updates(config, gradients(1))
    step = (PARAMS["h.0.attn.c_attn.kernel"] - found["h.0.attn.c_attn.kernel"]) / 0.1
    singular = np.linalg.svd(step, compute_uv=False)
    # Five Newton-Schulz steps with Muon's coefficients leave singular values in about 0.7 to 1.2,
    # times Optax's shape factor sqrt(max(1, columns / rows)), here sqrt(3).
    assert singular.min() > 0.5
    assert singular.max() < 1.3 * np.sqrt(3)
    assert singular.max() / singular.min() < 2.0


def test_clipping_bounds_the_global_norm() -> None:
    config = dataclasses.replace(CONFIG, grad_clip=0.5, weight_decay=0.0)
    grads = gradients(1)
    norm = np.sqrt(sum((g**2).sum() for g in grads[0].values()))
    scaled = [{name: grad * 0.5 / norm for name, grad in grads[0].items()}]
    unclipped = updates(dataclasses.replace(config, grad_clip=1e9), scaled)
    for name, value in updates(config, grads).items():
        assert np.abs(value - unclipped[name]).max() < 1e-9


@pytest.mark.parametrize("lr_schedule", ["cosine", "linear"])
def test_rate_rises_then_falls_to_its_final_share(lr_schedule: Literal["cosine", "linear"]) -> None:
    config = dataclasses.replace(CONFIG, lr_schedule=lr_schedule, final_lr_fraction=0.1)
    rates = [float(schedule(config, 2.0)(step)) for step in range(101)]
    assert rates[:11] == pytest.approx(np.linspace(2 / 11, 2.0, 11))
    assert max(rates) == rates[10] == pytest.approx(2.0)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[100] == pytest.approx(0.2)
    middle = 1.1  # halfway between 2.0 and 0.2, for a cosine and for a line
    assert rates[55] == pytest.approx(middle, abs=1e-5)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.999])
@pytest.mark.parametrize("lr_schedule", ["cosine", "linear"])
def test_rate_stays_at_its_peak_until_the_steps_that_decay(
    lr_schedule: Literal["cosine", "linear"], share: float
) -> None:
    config = dataclasses.replace(CONFIG, lr_schedule=lr_schedule, final_lr_fraction=0.1, decay_fraction=share)
    rates = [float(schedule(config, 2.0)(step)) for step in range(101)]
    falls = 100 - round(share * 90)
    assert rates[:11] == pytest.approx(np.linspace(2 / 11, 2.0, 11))
    assert rates[10 : falls + 1] == [2.0] * (falls - 9)
    assert all(a > b for a, b in itertools.pairwise(rates[falls:]))
    assert rates[100] == pytest.approx(0.2)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
def test_an_impossible_share_of_decay_is_refused(share: float) -> None:
    with pytest.raises(UserError, match=r"decay_fraction \(.*\) must lie in \(0, 1\]"):
        dataclasses.replace(CONFIG, decay_fraction=share)


def test_a_configuration_from_before_decay_fraction_is_that_of_a_fall_from_the_peak_on() -> None:
    old = dataclasses.asdict(CONFIG)
    del old["decay_fraction"]
    assert TrainConfig.from_json(old, "config.json") == CONFIG


def test_optimizer_state_is_held_under_the_labels_that_checkpoints_have() -> None:
    for model in (MODEL, QAT):
        shapes = abstract_params(model)
        groups = jax.eval_shape(make_optimizer(CONFIG, model).init, shapes)[1].inner_states
        assert set(groups) == {"kernel", "embedding", "vector"} | ({"scale"} if model.qat else set())
        for name, shape in shapes.items():
            last = name.rpartition(".")[2]
            label = {"kernel": "kernel", "embedding": "embedding", "input_scale": "scale"}.get(last, "vector")
            held = [
                found for found, state in groups.items() if name in str(jax.tree.flatten_with_path(state)[0])
            ]
            assert held == [label], (name, shape)


NEW_OPTIMIZER = """
import optax


def matrices(config, learning_rate):
    return optax.sgd(learning_rate)
"""


def test_an_optimizer_is_added_by_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "descent.py").write_text(NEW_OPTIMIZER)
    package = jaxgpt.training.optimizers
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    try:
        config = TrainConfig(
            optimizer="descent", batch_size=2, warmup_steps=0, learning_rate=0.1, grad_clip=1e9
        )
        training = CompiledTraining(MODEL, config, make_mesh("", 1), FLOAT32)
        state, step = training.first_state(), training.compile_step()
        tokens = jax.device_put(np.arange(8, dtype=np.int32).reshape(1, 2, 4), training.batch_sharding)
        before = {name: np.asarray(array) for name, array in state.params.items()}
        state, metrics = step(state, tokens, tokens)
    finally:
        sys.modules.pop("jaxgpt.training.optimizers.descent", None)
    moved = [np.asarray(state.params[name]) - before[name] for name in before if name.endswith("kernel")]
    # Descent moves by rate * gradient, whose norm is part of the whole gradient's.
    norm = np.sqrt(sum((change.astype(np.float64) ** 2).sum() for change in moved))
    assert 0 < norm < 0.1 * float(metrics["grad_norm"])


def test_an_unknown_optimizer_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"optimizer 'adam' is unknown; did you mean adamw\?"):
        find_optimizer("adam")
    with pytest.raises(UserError, match="expected one of: adamw, muon"):
        make_optimizer(dataclasses.replace(CONFIG, optimizer="zzz"), MODEL)


def test_input_scales_move_by_shares_of_themselves_and_count_for_no_norm() -> None:
    """The same gradients move a scale of 10 and one of 1e-3 by the same share; neither is decayed."""
    config = dataclasses.replace(CONFIG, grad_clip=0.5, warmup_steps=0)
    optimizer, without = make_optimizer(config, QAT), make_optimizer(config, MODEL)
    params = {
        "lm_head.input_scale": jnp.float32(10.0),
        "h.0.mlp.c_fc.input_scale": jnp.float32(1e-3),
        "ln_f.bias": jnp.ones(2),
    }
    state, other = optimizer.init(params), without.init({"ln_f.bias": params["ln_f.bias"]})
    plain = {"ln_f.bias": params["ln_f.bias"]}
    m, v, expected = 0.0, 0.0, 1.0
    for t, g in enumerate((0.3, -0.1, 0.2), 1):
        grads = {name: jnp.full_like(value, g) for name, value in params.items()}
        rate = float(schedule(config, config.embedding_learning_rate)(t - 1))
        update, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, update)
        update, other = without.update({"ln_f.bias": grads["ln_f.bias"]}, other, plain)
        plain = optax.apply_updates(plain, update)
        m = config.beta1 * m + (1 - config.beta1) * g
        v = config.beta2 * v + (1 - config.beta2) * g * g
        expected *= 1 - rate * m / (1 - config.beta1**t) / ((v / (1 - config.beta2**t)) ** 0.5 + 1e-8)
        assert float(params["lm_head.input_scale"]) == pytest.approx(10 * expected, rel=1e-5)
        assert float(params["h.0.mlp.c_fc.input_scale"]) == pytest.approx(1e-3 * expected, rel=1e-5)
        assert np.array_equal(params["ln_f.bias"], plain["ln_f.bias"])


def test_input_scales_stay_positive_at_any_rate() -> None:
    config = dataclasses.replace(CONFIG, embedding_learning_rate=50.0, warmup_steps=0)
    optimizer = make_optimizer(config, QAT)
    params = {"lm_head.input_scale": jnp.float32(1.0)}
    update, _ = optimizer.update({"lm_head.input_scale": jnp.float32(1.0)}, optimizer.init(params), params)
    assert float(optax.apply_updates(params, update)["lm_head.input_scale"]) == 0.5
