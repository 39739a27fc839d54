import copy
import dataclasses
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxgpt_bench.speed.random_models import random_tensors
from jaxgpt_export.generation.torch_session import TorchSession, UncachedTorchSession
from jaxgpt_export.model.build import float_model, load
from jaxgpt_export.model.kv_cache import KVCache

from jaxgpt.shared.architecture import parameters
from jaxgpt.shared.config import ModelConfig, Positions
from jaxgpt.shared.errors import UserError

CONFIG = ModelConfig(vocab_size=97, block_size=24, n_layer=3, n_head=4, n_embd=32)
FLOAT32_TOLERANCE = 1e-5  # logits of size 1, sums in another order


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """Matrices of ten times the usual size, so that attention is far from uniform."""
    norms = ("ln_1", "ln_2", "ln_f")
    tensors = {
        name: tensor if name.split(".")[-2] in norms else tensor * 10
        for name, tensor in random_tensors(CONFIG).items()
    }
    return float_model(CONFIG, tensors)


def test_logits_equal_transformers_on_random_parameters(model: torch.nn.Module) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=97, n_positions=24, n_layer=3, n_head=4, n_embd=32)
    ).eval()
    state = {}
    for name, tensor in model.state_dict().items():
        conv1d = tensor.ndim == 2 and not name.startswith(("wte", "wpe", "lm_head"))
        state[name if name == "lm_head.weight" else f"transformer.{name}"] = tensor.t() if conv1d else tensor
    theirs.load_state_dict(state, strict=True)
    tokens = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (model(tokens) - theirs(tokens).logits).abs().max()
        size = model(tokens).abs().max()
    assert float(difference) <= FLOAT32_TOLERANCE * float(size)


@pytest.mark.parametrize("cuts", [[1] * 24, [5, 1, 18], [23, 1], [7, 7, 10]])
def test_cache_gives_the_logits_of_the_whole_text(model: torch.nn.Module, cuts: list[int]) -> None:
    tokens = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = model(tokens)
        cache = KVCache(CONFIG, batch=2)
        parts = [model(piece, cache) for piece in tokens.split(cuts, dim=1)]
    assert float((torch.cat(parts, dim=1) - whole).abs().max()) <= FLOAT32_TOLERANCE * float(
        whole.abs().max()
    )
    assert cache.length == 24


def test_more_tokens_than_the_context_are_refused(model: torch.nn.Module) -> None:
    with pytest.raises(UserError, match="25 tokens were given, the model's context holds 24"):
        model(torch.zeros(1, 25, dtype=torch.long))


@pytest.mark.parametrize("kind", ["fp32", "int8_dynamic", "int8_static"])
def test_sessions_with_and_without_cache_agree(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    model = load(folder)
    cached, uncached = TorchSession(model), UncachedTorchSession(model)
    tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=20).tolist()
    pairs = [(cached.prefill(tokens[:5]), uncached.prefill(tokens[:5]))]
    pairs += [(cached.decode(token), uncached.decode(token)) for token in tokens[5:]]
    tolerance = 1e-4 if kind == "fp32" else 0  # INT8: what lies between its matrices is float64, rounded once
    assert max(float(np.abs(a - b).max()) for a, b in pairs) <= tolerance


def test_a_session_starts_anew(int8_dynamic: Path) -> None:
    session = TorchSession(load(int8_dynamic))
    first = session.prefill([1, 2, 3]).copy()
    session.decode(4)
    assert (session.prefill([1, 2, 3]) == first).all()


@pytest.mark.parametrize("kind", ["fp32", "int8_dynamic", "int8_static", "int4"])
def test_a_module_is_pickled_and_copied_as_any_other(kind: str, request: pytest.FixtureRequest) -> None:
    model = load(request.getfixturevalue(kind))
    tokens = torch.tensor([[1, 2, 3], [5, 7, 11]])
    expected = model(tokens)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    again = (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), torch.load(saved, weights_only=False))
    for each in again:
        assert torch.equal(each(tokens), expected)


def test_float_module_is_differentiable(model: torch.nn.Module) -> None:
    weight = model.h[0].attn.c_attn.weight
    weight.requires_grad_(True)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert float(weight.grad.abs().sum()) > 0
    weight.requires_grad_(False)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_the_module_s_state_is_the_table_of_parameters(tied: bool, positions: Positions) -> None:
    config = dataclasses.replace(CONFIG, tied=tied, positions=positions)
    state = float_model(config, random_tensors(config)).state_dict()
    expected = {each.name: each.shape for each in parameters(config)}
    if tied:  # PyTorch lists the head too; it is the embedding
        assert state["lm_head.weight"].data_ptr() == state["wte.weight"].data_ptr()
        del state["lm_head.weight"]
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
