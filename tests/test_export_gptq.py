from collections.abc import Sequence

import pytest
import torch
from conftest import Command, assert_one_line_error
from jaxgpt_bench.speed.random_models import random_tensors
from jaxgpt_export.model.arithmetic import (
    dequantize,
    int4_scale,
    pack_int4,
    quantize_rows,
    round_int4,
    unpack_int4,
)
from jaxgpt_export.model.build import float_model
from jaxgpt_export.model.weight_only import WeightOnlyLinear
from jaxgpt_export.quantize.calibration import collect_inputs
from jaxgpt_export.quantize.gptq import best_scale, gptq, gptq_rows, round_groups
from jaxgpt_export.quantize.layer_order import round_in_order
from jaxgpt_export.quantize.quantizer import group_size_of

from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.errors import UserError

CONFIG = ModelConfig(vocab_size=97, block_size=24, n_layer=2, n_head=4, n_embd=32)
G = 16


def correlated_inputs(rows: int, channels: int) -> torch.Tensor:
    """Inputs of which channels say something about each other, as those of a network do."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(channels // 4, channels, generator=generator)
    noise = 0.1 * torch.randn(rows, channels, generator=generator)
    return torch.randn(rows, channels // 4, generator=generator) @ mixing + noise


def layer() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(24, 64, generator=torch.Generator().manual_seed(1)) * 0.1, correlated_inputs(512, 64)


def output_error(rounded: Sequence[torch.Tensor | None], weight: torch.Tensor, x: torch.Tensor) -> float:
    """Mean squared output error, in float64, apart from the code under test."""
    q, scale, factor = (*rounded, None)[:3]
    scale = scale if factor is None else scale[:, None] * factor
    back = q.double() * scale.double().repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    return float((x.double() @ (back - weight.double()).t()).square().mean())


def test_packed_integers_come_back() -> None:
    q = torch.randint(-8, 8, (5, 12), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    packed = pack_int4(q)
    assert packed.shape == (5, 6)
    assert torch.equal(unpack_int4(packed), q)
    assert packed[0, 0] == (int(q[0, 0]) + 8) + 16 * (int(q[0, 1]) + 8)


def test_the_extreme_of_a_group_of_either_sign_is_minus_8() -> None:
    weight = torch.tensor([[0.1, -0.8, 0.3, 0.2], [0.1, 0.8, -0.3, 0.2]])
    q, scale, _ = round_groups(weight, 4)
    assert q[0].tolist()[1] == q[1].tolist()[1] == -8
    assert bool((scale[0] > 0).all())
    assert bool((scale[1] < 0).all())


def test_rounding_error_of_a_group_is_at_most_half_a_scale_but_for_the_one_value_on_the_other_side() -> None:
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    q, scale, _ = round_groups(weight, G)
    wide = scale.float().repeat_interleave(G, dim=1)
    inside = (weight / wide).abs() <= 7.5
    # half a scale; bfloat16 scales are exact here: they were rounded before the integers were chosen
    assert float(((q * wide - weight) / wide).abs()[inside].max()) <= 0.5 + 1e-5


def test_a_group_of_zeros_stays_zero() -> None:
    q, scale, _ = round_groups(torch.zeros(2, G), G)
    assert bool((q == 0).all())
    assert bool((scale != 0).all())
    assert bool(torch.isfinite(scale).all())


def test_the_chosen_scale_is_the_best_of_those_tried() -> None:
    weight = torch.randn(40, G, generator=torch.Generator().manual_seed(0))
    importance = torch.linspace(0.1, 3.0, G)

    def error(scale: torch.Tensor) -> torch.Tensor:
        wide = scale[:, None].expand_as(weight)
        return ((round_int4(weight, wide) * wide.float() - weight) ** 2 * importance).sum(1)

    found = error(best_scale(weight, importance))
    extreme = weight.gather(1, weight.abs().argmax(1, keepdim=True))[:, 0]
    plain = error(int4_scale(extreme))
    assert bool((found <= plain + 1e-6).all())
    assert float(found.sum()) < 0.95 * float(plain.sum())


def test_gptq_takes_back_more_than_half_of_the_error_of_plain_rounding() -> None:
    weight, x = layer()
    moments = (x.t() @ x).double()
    ours = output_error(gptq(weight, moments, G), weight, x)
    plain = output_error(round_groups(weight, G), weight, x)
    assert ours < 0.5 * plain


def test_gptq_follows_its_formula_column_by_column() -> None:
    """The same algorithm with one full update of all later columns at a time, in float64."""
    weight, x = layer()
    moments = (x.t() @ x).double()
    q, scale, _ = gptq(weight, moments, G)
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left = weight.double().clone()
    scales = scale.double().repeat_interleave(G, dim=1)
    agreeing = 0
    for i in range(64):
        expected = torch.round(left[:, i] / scales[:, i]).clamp(-8, 7)
        agreeing += int((expected == q[:, i]).sum())
        left -= ((left[:, i] - q[:, i] * scales[:, i]) / upper[i, i])[:, None] * torch.cat(
            [torch.zeros(i, dtype=torch.float64), upper[i, i:]]
        )[None]
    assert agreeing >= 0.998 * q.numel()  # float32 against float64 on a rounding edge


def test_factors_of_groups_cost_little_and_are_no_zeros() -> None:
    """Scales of groups are then whole multiples, up to 127, of the row's: nearly those that they were."""
    weight, x = layer()
    weight[3] *= torch.logspace(-4, 0, 64)  # groups whose scale is far below the row's
    moments = (x.t() @ x).double()
    free, ours = gptq(weight, moments, G), gptq(weight, moments, G, factors=True)
    plain = round_groups(weight, G, factors=True)
    for found in (ours, plain):
        assert found.factor is not None
        assert found.scale.shape == (len(weight),)
        assert found.scale.dtype == torch.float32
        assert found.factor.dtype == found.q.dtype == torch.int8
        assert bool(found.factor.ne(0).all())
        assert int(found.factor.int().abs().max()) <= 127
        assert int(found.q.min()) >= -8
        assert int(found.q.max()) <= 7
    assert output_error(ours, weight, x) < 0.5 * output_error(plain, weight, x)
    assert output_error(ours, weight, x) < 1.05 * output_error(free, weight, x)


def test_gptq_of_8_bits_keeps_the_scales_of_plain_rounding() -> None:
    weight, x = layer()
    plain, scale = quantize_rows(weight)
    q, found = gptq_rows(weight, x.t() @ x)
    assert torch.equal(found, scale)
    assert int(q.abs().max()) <= 127
    errors = [output_error((each, scale[:, None]), weight, x) for each in (q, plain)]
    assert errors[0] < 0.5 * errors[1]


def test_channels_that_calibration_never_saw_are_rounded_plainly() -> None:
    weight, x = layer()
    x[:, 7] = 0
    q, scale, _ = gptq(weight, (x.t() @ x).double(), G)
    assert bool(torch.isfinite(scale.float()).all())
    assert output_error((q, scale), weight, x) < output_error(round_groups(weight, G), weight, x)


def test_layers_are_rounded_in_order_on_inputs_from_rounded_ones() -> None:
    tensors = random_tensors(CONFIG)
    tokens = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(0)).int()
    names: list[str] = []
    seen: dict[str, torch.Tensor] = {}

    def halve_the_first(name: str, weight: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
        names.append(name)
        seen[name] = moments
        return weight / 2 if name == "h.0.attn.c_attn" else weight

    round_in_order(CONFIG, tensors, tokens, halve_the_first)
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names == [*(f"h.{i}.{part}" for i in range(2) for part in parts), "wte"]
    halved = {**tensors, "h.0.attn.c_attn.weight": tensors["h.0.attn.c_attn.weight"] / 2}
    model, total = float_model(CONFIG, halved), torch.zeros(32, 32)

    def keep(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal total
        x = args[0].flatten(0, -2)
        total = total + x.t() @ x

    model.h[1].mlp.c_fc.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(tokens.long())
    torch.testing.assert_close(seen["h.1.mlp.c_fc"].float(), total, rtol=1e-4, atol=1e-4)


def test_nan_while_rounding_names_the_layer() -> None:
    tensors = random_tensors(CONFIG)
    tensors["h.1.ln_2.weight"] = torch.full((32,), float("nan"))
    tokens = torch.zeros(1, 8, dtype=torch.int32)
    with pytest.raises(UserError, match=r"input of h\.1\.mlp\.c_fc holds NaN"):
        round_in_order(CONFIG, tensors, tokens, lambda name, weight, moments: weight)


@pytest.mark.parametrize(("channels", "size"), [(64, 32), (48, 16), (6, 2)])
def test_the_group_size_divides_the_channels(channels: int, size: int) -> None:
    assert group_size_of(ModelConfig(97, 24, 1, 1, channels)) == size


def test_odd_channels_have_no_4_bit_form() -> None:
    with pytest.raises(UserError, match="even number of channels, n_embd is 7"):
        group_size_of(ModelConfig(97, 24, 1, 1, 7))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_only_layer_multiplies_with_what_its_integers_stand_for(bits: int) -> None:
    weight, x = layer()
    bias = torch.linspace(-1, 1, 24)
    if bits == 8:
        scale = weight.abs().amax(1) / 127
        q = torch.round(weight / scale[:, None]).to(torch.int8)
        made, exact = WeightOnlyLinear(q, scale, bias), q.double() * scale.double()[:, None]
    else:
        q, scale, _ = round_groups(weight, G)
        made = WeightOnlyLinear(pack_int4(q), scale, bias)
        exact = q.double() * scale.double().repeat_interleave(G, dim=1)
    expected = x.double() @ exact.t() + bias.double()
    # float32 sums of 64 products
    assert float((made(x).double() - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    other = WeightOnlyLinear(made.weight.flip(0), made.weight_scale.flip(0), bias)
    made.load_state_dict(other.state_dict())
    assert torch.equal(made(x), other(x))


def test_dequantized_rows_can_be_taken_one_by_one() -> None:
    q, scale, _ = round_groups(torch.randn(6, 32, generator=torch.Generator().manual_seed(0)), G)
    packed = pack_int4(q)
    assert torch.equal(dequantize(packed[[4, 1]], scale[[4, 1]]), dequantize(packed, scale)[[4, 1]])


def test_int4_without_data_is_one_line(command: Command, fp32: object, tmp_path: object) -> None:
    arguments = ("--artifact", fp32, "--method", "int4-weight-only", "--out", f"{tmp_path}/a")
    assert_one_line_error(command("jaxgpt-export", "quantize", *arguments), "--data")


def test_inputs_too_large_to_square_are_rounded_all_the_same() -> None:
    """A final norm's gain of 1e22: the squares of what it puts out pass float32."""
    tensors = random_tensors(CONFIG)
    tensors["ln_f.weight"] = tensors["ln_f.weight"] * 1e22
    tokens = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(0)).int()
    seen = collect_inputs(float_model(CONFIG, tensors), tokens)["lm_head"]
    assert bool(torch.isfinite(seen.moments).all())
    q, _ = gptq_rows(tensors["wte.weight"], seen.moments)
    x = seen.sample / seen.sample.abs().max()
    plain, scale = quantize_rows(tensors["wte.weight"])
    errors = [output_error((each, scale[:, None]), tensors["wte.weight"], x) for each in (q, plain)]
    assert errors[0] < errors[1]


def test_moments_that_are_none_are_one_error() -> None:
    weight, x = layer()
    with pytest.raises(UserError, match="too uneven"):
        gptq_rows(weight, (x.t() @ x) * float("nan"))
