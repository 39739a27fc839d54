import pickle
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jaxgpt_export.model import int8_kernels
from jaxgpt_export.model.arithmetic import pack_int4, quantize_rows
from jaxgpt_export.model.int4_linear import Int4Linear
from jaxgpt_export.model.int8_kernels import (
    FEW,
    KERNELS,
    MANY,
    TRIALS,
    exact_kernels,
    fastest_kernel,
    is_exact,
)
from jaxgpt_export.model.int8_linear import Int8Linear
from jaxgpt_export.model.weight_only import QuantizedEmbedding, WeightOnlyLinear
from jaxgpt_export.quantize.gptq import round_groups


def random_layer(static: bool, smooth: bool, O: int = 37, I: int = 64) -> tuple[Int8Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, scale = quantize_rows(torch.randn(O, I, generator=generator))
    bias = torch.randn(O, generator=generator)
    vector = torch.rand(I, generator=generator) + 0.5 if smooth else None
    layer = Int8Linear(q, scale, bias, torch.tensor(0.02) if static else None, vector)
    x = torch.randn(9, I, generator=generator)
    x[4] = 0
    return layer, x


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("smooth", [False, True])
def test_layer_is_the_integer_formula(static: bool, smooth: bool) -> None:
    layer, x = random_layer(static, smooth)
    found = layer(x).numpy()
    f = np.float32
    xs = x.numpy() / layer.smooth.numpy() if layer.smooth is not None else x.numpy()
    s_x = (
        np.full((9, 1), 0.02, f)
        if static
        else np.maximum(np.abs(xs).max(axis=1, keepdims=True) / f(127), f(2.0**-126))
    )
    q_x = np.clip(np.rint(xs / s_x), -127, 127).astype(np.int64)
    sums = (q_x @ layer.weight.numpy().astype(np.int64).T).astype(f)
    expected = sums * (s_x * layer.weight_scale.numpy()) + layer.bias.numpy()
    assert (layer.quantize_input(x)[0].numpy() == q_x).all()
    assert (found == expected).all()  # single float32 operations in the written order: the same bits


@pytest.mark.parametrize("two_level", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_a_layer_of_4_bits_is_the_integer_formula(static: bool, two_level: bool) -> None:
    """Extreme integers and factors too, whose sums float32 does not hold exactly."""
    generator = torch.Generator().manual_seed(0)
    O, I, G = 37, 4096, 32
    q = torch.randint(-8, 8, (O, I), generator=generator, dtype=torch.int8)
    factor = torch.randint(1, 128, (O, I // G), generator=generator, dtype=torch.int8)
    factor[::2] *= -1
    q[5], factor[5] = -8, 127
    scale, bias = torch.rand(O, generator=generator) / 1000, torch.randn(O, generator=generator)
    layer = Int4Linear(
        pack_int4(q), scale, factor, bias, torch.tensor(0.02) if static else None, None, two_level
    )
    x = torch.randn(9, I, generator=generator)
    x[4], x[6] = 0, -3
    f = np.float32
    xs = x.numpy()
    s_x = (
        np.full((9, 1), 0.02, f)
        if static
        else np.maximum(np.abs(xs).max(axis=1, keepdims=True) / f(127), f(2.0**-126))
    )
    weights = q.numpy().astype(np.int64) * factor.numpy().astype(np.int64).repeat(G, axis=1)
    q_x = np.clip(np.rint(xs / s_x), -127, 127)
    sums = (q_x.astype(np.int64) @ weights.T).astype(f)
    if two_level:
        rest = np.clip(np.rint((xs - q_x * s_x) / s_x * f(256)), -127, 127)
        sums = (rest.astype(np.int64) @ weights.T).astype(f) / f(256) + sums
    expected = sums * (s_x * scale.numpy()) + bias.numpy()
    assert np.abs(sums).max() > 2**24
    assert np.array_equal(layer(x).numpy(), expected)
    assert torch.equal(layer.float_weight(), torch.from_numpy(weights).float() * scale[:, None])
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_layer_is_near_the_float_layer_and_keeps_any_batch_shape() -> None:
    layer, x = random_layer(static=False, smooth=False)
    weight = layer.weight.float() * layer.weight_scale[:, None]
    exact = torch.nn.functional.linear(x, weight, layer.bias)
    # Rounding an input moves it by at most half a scale of max|x| / 127 in each of 64 products.
    bound = 0.5 / 127 * x.abs().amax(dim=1, keepdim=True) * weight.abs().sum(dim=1)[None] + 1e-5
    assert ((layer(x) - exact).abs() <= bound).all()
    assert torch.equal(layer(x.reshape(3, 3, -1)).reshape(9, -1), layer(x))
    assert torch.equal(layer(x[4:5]), layer.bias[None])  # a token of zeros


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_kernels_that_are_taken_give_the_sums_of_int64(name: str, tokens: int) -> None:
    if name not in exact_kernels():
        pytest.skip(f"{name} is not exact on this processor, and not taken")
    draw = np.random.default_rng(tokens)
    weight = draw.integers(-127, 128, (48, 1024)).astype(np.int8)
    inputs = draw.integers(-127, 128, (tokens, 1024)).astype(np.int8)
    weight[0], inputs[0] = 127, -127  # the largest sum, which float32 holds exactly
    found = KERNELS[name](torch.from_numpy(weight))(torch.from_numpy(inputs).float())
    exact = inputs.astype(np.int64) @ weight.astype(np.int64).T
    assert np.array_equal(found.numpy(), exact.astype(np.float32))
    assert fastest_kernel(37, 64, tokens) in exact_kernels()


def test_a_kernel_that_is_far_slower_than_another_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    now = 0.0

    def made(name: str, seconds: float) -> Callable[[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
        def product(q: torch.Tensor) -> torch.Tensor:
            nonlocal now
            calls[name] += 1
            now += seconds
            return torch.full((len(q), 8), float(q.shape[-1]))  # weight and inputs are ones

        return lambda weight: product

    kernels = {"loop": made("loop", 0.05), "quick": made("quick", 0.001), "second": made("second", 0.002)}
    monkeypatch.setattr(int8_kernels, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(int8_kernels, "KERNELS", kernels)
    monkeypatch.setattr(int8_kernels, "exact_kernels", lambda: tuple(kernels))
    assert fastest_kernel.__wrapped__(8, 8, 64) == "quick"
    assert calls == {"loop": 1, "quick": TRIALS, "second": TRIALS}


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (64, 1), (1, 3), (33, 2)])
def test_the_kernel_of_a_shape_is_exact_for_it(shape: tuple[int, int]) -> None:
    """_int_mm of PyTorch 2.13 reads beside a weight of one input."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    for tokens in (FEW, MANY):
        q = torch.randint(-127, 128, (tokens, shape[1]), generator=generator)
        product = KERNELS[fastest_kernel(*shape, tokens)](weight)
        assert torch.equal(product(q.float()), (q @ weight.long().t()).float())


def fbgemm_product(weight: torch.Tensor, lowest: int, highest: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """FBGEMM's product: unsigned bytes q + 128 by signed ones, in pairs that are clipped to these bounds."""

    def product(q: torch.Tensor) -> torch.Tensor:
        products = (q.int() + 128)[:, None, :] * weight[None].int()
        pairs = products.reshape(len(q), len(weight), -1, 2).sum(-1)
        return (pairs.clamp(lowest, highest).sum(-1) - 128 * weight.int().sum(-1)).float()

    return product


def test_a_saturating_kernel_is_noticed() -> None:
    int16, int32 = torch.iinfo(torch.int16), torch.iinfo(torch.int32)
    assert is_exact(lambda weight: fbgemm_product(weight, int32.min, int32.max))
    # vpmaddubsw adds two products in 16 bits: 2 * 255 * 127 does not fit.
    assert not is_exact(lambda weight: fbgemm_product(weight, int16.min, int16.max))


def test_kernels_give_the_same_integers() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (200, 3072), generator=generator, dtype=torch.int8)
    q = torch.randint(-127, 128, (17, 3072), generator=generator, dtype=torch.int8)
    exact = (q.long() @ weight.long().t()).float()
    for name, make in KERNELS.items():
        if is_exact(make):
            assert torch.equal(make(weight)(q.float()), exact), name


def test_embedding_returns_the_rounded_rows() -> None:
    weight = torch.randn(11, 8, generator=torch.Generator().manual_seed(0))
    q, scale = quantize_rows(weight)
    smooth = torch.linspace(0.5, 2.0, 8)
    tokens = torch.tensor([[3, 0], [10, 3]])
    rows = (q.float() * scale[:, None])[tokens]
    assert torch.equal(QuantizedEmbedding(q, scale)(tokens), rows)
    assert torch.equal(QuantizedEmbedding(q, scale, smooth)(tokens), rows / smooth)


@pytest.mark.parametrize("static", [False, True])
def test_a_loaded_state_is_what_is_computed(static: bool) -> None:
    layer, x = random_layer(static, smooth=False)
    layer(x)  # packs both kernels
    other = Int8Linear(
        layer.weight.flip(0), layer.weight_scale.flip(0), layer.bias, layer.input_scale, layer.smooth
    )
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    assert torch.equal(layer(x[:1]), other(x[:1]))


@pytest.mark.parametrize("static", [False, True])
def test_a_two_level_input_follows_the_definition_and_is_a_hundred_times_nearer(static: bool) -> None:
    plain, x = random_layer(static, smooth=False)
    if static:
        x = x.clamp(-120 * plain.input_scale, 120 * plain.input_scale)
    layer = Int8Linear(plain.weight, plain.weight_scale, plain.bias, plain.input_scale, None, two_level=True)
    a = x.numpy().reshape(-1, x.shape[-1])
    largest = np.maximum(np.abs(a).max(axis=1, keepdims=True) / np.float32(127), np.float32(2.0**-126))
    s = np.full_like(largest, float(plain.input_scale)) if static else largest
    q = np.clip(np.rint(a / s), -127, 127)
    p = np.clip(np.rint((a - q * s) / s * np.float32(256)), -127, 127)
    w = plain.weight.numpy().astype(np.int64)
    sums = (q.astype(np.int64) @ w.T).astype(np.float32) + (p.astype(np.int64) @ w.T).astype(
        np.float32
    ) / np.float32(256)
    expected = sums * (s * plain.weight_scale.numpy()) + plain.bias.numpy()
    assert (layer(x).numpy().reshape(expected.shape) == expected).all()
    exact = x.double() @ plain.float_weight().double().t() + plain.bias.double()
    errors = [float((each(x).double() - exact).abs().max()) for each in (layer, plain)]
    assert errors[0] < errors[1] / 50


def test_an_embedding_of_4_bits_gives_the_rows_that_its_head_has() -> None:
    weight = torch.randn(11, 32, generator=torch.Generator().manual_seed(0))
    q, scale, _ = round_groups(weight, 8)
    embedding, head = QuantizedEmbedding(pack_int4(q), scale), WeightOnlyLinear(pack_int4(q), scale)
    tokens = torch.tensor([[3, 10], [0, 3]])
    assert torch.equal(embedding(tokens), head.float_weight()[tokens])
    assert float((embedding.float_weight() - weight).abs().max()) < float(weight.abs().max()) / 8


def test_weights_only_layers_compute_in_float64_where_they_are_moved_there() -> None:
    weight, scale = quantize_rows(torch.randn(7, 32, generator=torch.Generator().manual_seed(0)))
    layer, x = WeightOnlyLinear(weight, scale), torch.randn(3, 32)
    expected = x.double() @ layer.float_weight().double().t()
    assert torch.allclose(layer.double()(x.double()), expected, rtol=1e-14, atol=0)
