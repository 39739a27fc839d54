import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Command, assert_one_line_error, python, rows, write_jsonl
from jaxgpt_export.model.build import load
from jaxgpt_export.parity import (
    assert_logits_close,
    assert_quantization_loss,
    compare_models,
    first_deviation,
    open_model,
)
from jaxgpt_export.parity.layers import layer_errors
from jaxgpt_export.pytest_plugin import _block_size
from safetensors.torch import load_file, save_file

from jaxgpt.shared.dataset import open_dataset, windows
from jaxgpt.shared.errors import UserError

MAX_KL = 2e-5  # the good INT8 artifacts of these tests: 4e-6


@pytest.fixture(scope="module")
def tokens(data: Path) -> torch.Tensor:
    inputs, _ = windows(open_dataset(data).val, 64)
    return torch.from_numpy(inputs[:4])


def broken(artifact: Path, folder: Path, change: str) -> Path:
    """Copy an artifact and damage its h.1.attn.c_attn or h.1.attn.c_proj in a way that loads."""
    shutil.copytree(artifact, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    prefix = "transformer." if "transformer.wte.weight" in tensors else ""
    name = f"{prefix}h.1.attn.{'c_proj' if change == 'transposed' else 'c_attn'}.weight"
    if change == "transposed":
        tensors[name] = tensors[name].t().contiguous()
    else:  # queries and values swapped
        axis = 1 if prefix else 0
        q, k, v = tensors[name].chunk(3, dim=axis)
        tensors[name] = torch.cat([v, k, q], dim=axis).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_a_run_its_artifact_and_transformers_agree_as_a_whole_and_in_every_layer(
    run: Path, fp32: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    shutil.copytree(fp32, tmp_path / "hf", ignore=shutil.ignore_patterns("certificate.json"))
    flax, ours, theirs = open_model(run), open_model(fp32), open_model(tmp_path / "hf")
    for other in (ours, theirs):
        found = assert_logits_close(flax, other, tokens)
        assert found.loss_increase == pytest.approx(0, abs=1e-5)
        errors = layer_errors(flax, other, tokens)
        assert list(errors)[:3] == ["wte", "wpe", "h.0.ln_1"]
        assert list(errors)[-2:] == ["ln_f", "lm_head"]
        assert len(errors) == 2 + 2 * 6 + 2
        assert max(errors.values()) < 1e-4
        assert first_deviation(flax, other, tokens) is None


def test_losses_and_greedy_texts_are_compared(fp32: Path, int8_dynamic: Path, tokens: torch.Tensor) -> None:
    reference, model = open_model(fp32), open_model(int8_dynamic)
    found = compare_models(reference, model, tokens, greedy_tokens=8)
    logits = load(fp32)(tokens[:, :-1].long()).double()
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    expected = -log_p.gather(-1, tokens[:, 1:].long()[..., None]).mean()
    assert found.reference_loss == pytest.approx(float(expected), abs=1e-5)
    assert 0 < abs(found.loss_increase) < 0.05
    assert 0 < found.parity.kl_mean <= MAX_KL
    assert compare_models(reference, reference, tokens, greedy_tokens=8).greedy_parts_at is None


class Counting(torch.nn.Module):
    """Continues a text by one more than its last token; the last row's, from a length on, by two more."""

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.longest = longest

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        beyond = torch.arange(tokens.shape[1])[None] + 1 > self.longest
        last = torch.arange(len(tokens))[:, None] + 1 == len(tokens)
        following = (tokens.long() + 1 + (beyond & last)) % 20
        return torch.nn.functional.one_hot(following, 20).float()


@pytest.mark.parametrize(("agreed", "parts_at"), [(0, 0), (3, 3), (4, 4), (5, None)])
def test_greedy_texts_part_at_the_first_token_that_differs(agreed: int, parts_at: int | None) -> None:
    rows = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1]], dtype=torch.int32)
    reference, model = open_model(Counting(100)), open_model(Counting(3 + agreed))  # half a row is 4 tokens
    assert compare_models(reference, model, rows, greedy_tokens=5).greedy_parts_at == parts_at
    assert compare_models(model, reference, rows, greedy_tokens=5).greedy_parts_at == parts_at


def test_more_loss_than_is_allowed_is_refused_without_a_bound_on_kl() -> None:
    row = torch.arange(8, dtype=torch.int32)[None]
    reference, model = open_model(Counting(100)), open_model(Counting(4))
    increase = 3 / 7  # nats: a logit of 1 is missing from 3 of the 7 tokens that follow
    found = assert_quantization_loss(reference, model, row, max_increase=1.01 * increase)
    assert found.loss_increase == pytest.approx(increase, rel=1e-6)
    for bound in (0.99 * increase, float("nan")):
        with pytest.raises(AssertionError, match=r"loses \+0\.4286 nats a token"):
            assert_quantization_loss(reference, model, row, max_increase=bound)


@pytest.mark.parametrize("kind", ["fp32", "int8_dynamic", "int8_static"])
@pytest.mark.parametrize(
    ("change", "layer"), [("swapped", "h.1.attn.c_attn"), ("transposed", "h.1.attn.c_proj")]
)
def test_a_damaged_layer_is_named_with_its_tensor(
    kind: str,
    change: str,
    layer: str,
    fp32: Path,
    tokens: torch.Tensor,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    artifact = request.getfixturevalue(kind)
    reference = open_model(fp32)
    assert first_deviation(reference, open_model(artifact), tokens) is None
    model = open_model(broken(artifact, tmp_path / "broken", change))
    deviation = first_deviation(reference, model, tokens)
    assert deviation is not None
    assert (deviation.layer, deviation.tensor) == (layer, "weight")
    # The loss of a model after 40 steps hardly depends on its attention, its distribution does.
    check = assert_logits_close if kind == "fp32" else partial(assert_quantization_loss, max_kl=MAX_KL)
    with pytest.raises(AssertionError, match=rf"{layer}.*look at {layer}\.weight"):
        check(reference, model, tokens)


def test_models_of_other_vocabularies_and_other_folders_are_one_clear_line(
    fp32: Path, tmp_path: Path, tokens: torch.Tensor
) -> None:
    with pytest.raises(UserError, match="no run folder, artifact or Hugging Face folder"):
        open_model(tmp_path)

    class Other(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*tokens.shape, 7)

    with pytest.raises(UserError, match="different vocabularies"):
        compare_models(open_model(fp32), open_model(Other()), tokens)


def test_a_folder_that_transformers_would_fill_up_is_refused(
    command: Command, fp32: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(fp32, tmp_path / "hf", ignore=shutil.ignore_patterns("certificate.json"))
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    del tensors["transformer.h.1.attn.c_attn.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    arguments = ("compare", "--reference", fp32, "--model", tmp_path / "hf", "--data", data)
    assert_one_line_error(command("jaxgpt-export", *arguments), "missing tensors", "h.1.attn.c_attn.weight")
    path.write_bytes(path.read_bytes()[:2000])
    assert_one_line_error(command("jaxgpt-export", *arguments), "can't load")


def test_longer_windows_than_a_model_holds_are_one_line(command: Command, run: Path, data: Path) -> None:
    arguments = ("compare", "--reference", run, "--model", run, "--data", data, "--block-size", 65)
    assert_one_line_error(command("jaxgpt-export", *arguments), "65 tokens", "holds 64")


USERS_TEST = """
from jaxgpt_export.parity import assert_quantization_loss

def test_int8_costs_little(parity_reference, parity_model, parity_tokens):
    assert parity_tokens.shape[1] == 64
    assert_quantization_loss(parity_reference, parity_model, parity_tokens, max_increase=0.05, max_kl=2e-5)
"""


def users_pytest(folder: Path, *options: object) -> subprocess.CompletedProcess[str]:
    """Run pytest in a user's folder, with the plugin as an installation gives it."""
    (folder / "test_mine.py").write_text(USERS_TEST)
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rs",
            "-p",
            "no:cacheprovider",
            *map(str, options),
            str(folder),
        ],
        cwd=folder,
        env={**python("")[1], "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_plugin_holds_a_user_s_artifact_to_a_bound_and_names_what_broke_it(
    run: Path, fp32: Path, int8_dynamic: Path, data: Path, tmp_path: Path
) -> None:
    given = ("--parity-data", data, "--parity-tokens", 512, "--parity-reference")
    good = users_pytest(tmp_path, *given, run, "--parity-model", int8_dynamic)
    assert good.returncode == 0, good.stdout
    assert "1 passed" in good.stdout
    bad_model = broken(int8_dynamic, tmp_path / "broken", "swapped")
    bad = users_pytest(tmp_path, *given, fp32, "--parity-model", bad_model)
    assert bad.returncode == 1
    assert "h.1.attn.c_attn.weight" in bad.stdout
    nowhere = users_pytest(tmp_path, *given, fp32, "--parity-model", "nowhere")
    assert nowhere.returncode == 1
    assert "is no run folder, artifact or Hugging Face folder" in nowhere.stdout
    assert "Traceback" not in nowhere.stdout
    without = users_pytest(tmp_path)
    assert without.returncode == 0
    assert "give --parity-reference" in without.stdout


def test_the_plugin_knows_every_name_of_a_context(tmp_path: Path) -> None:
    for name in ("n_positions", "max_position_embeddings", "block_size"):
        (tmp_path / "config.json").write_text(json.dumps({name: 64}))
        assert _block_size(tmp_path) == 64
    (tmp_path / "config.json").write_text('{"n_positions": null}')
    with pytest.raises(UserError, match="it tells no context"):
        _block_size(tmp_path)


def test_compare_shows_both_and_gates(command: Command, run: Path, int8_dynamic: Path, data: Path) -> None:
    arguments = ("compare", "--reference", run, "--model", int8_dynamic, "--data", data, "--tokens", 512)
    code, _, err = command("jaxgpt-export", *arguments, "--greedy-tokens", 4)
    assert code == 0
    assert "KL" in err
    assert "h.1.mlp.c_proj" in err
    code, _, err = command("jaxgpt-export", *arguments, "--max-loss-increase", -1.0)
    assert code == 1
    assert "FAIL" in err


def test_compare_holds_the_largest_logit_difference_to_its_bound(
    command: Command, fp32: Path, int8_dynamic: Path, data: Path
) -> None:
    arguments = ("compare", "--reference", fp32, "--model", int8_dynamic, "--data", data, "--tokens", 256)
    call = ("jaxgpt-export", *arguments, "--json")
    largest = json.loads(command(*call)[1])["parity"]["max_abs_logit_diff"]
    assert largest > 0
    for share, passed in ((1.01, True), (0.99, False)):
        code, out, _ = command(*call, "--max-logit-diff", share * largest)
        assert (code, list(json.loads(out)["gates"].values())) == (int(not passed), [passed])
    for bound in ("--max-logit-diff", "--max-loss-increase"):
        assert_one_line_error(command(*call, bound, "nan"), "a bound (nan) must be a finite number")


def test_integers_of_two_artifacts_are_shown_and_are_no_gate(
    command: Command, int8_static: Path, int8_dynamic: Path, data: Path
) -> None:
    """A quantized model held to the one before it, by its loss: both have integers, and they differ."""
    arguments = ("compare", "--reference", int8_static, "--model", int8_dynamic, "--data", data)
    code, out, err = command(
        "jaxgpt-export", *arguments, "--tokens", 256, "--max-loss-increase", 0.5, "--json"
    )
    assert code == 0
    assert "integers: " in err
    figures = json.loads(out)
    assert figures["integers"]["inputs"] > 0
    assert [text.split()[0] for text in figures["gates"]] == ["loss"]


def test_compare_counts_what_the_data_set_counts_and_wants_its_tokenizer(
    command: Command, fp32: Path, int8_dynamic: Path, data: Path, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", rows(200))
    call = (
        "--source",
        tmp_path / "rows.jsonl",
        "--template",
        r"{instruction}\n{output}",
        "--val-fraction",
        0.3,
    )
    for name, *more in (
        ("masked", "--answers-only", "--tokenizer", data),
        ("other", "--tokenizer", "bpe:300"),
    ):
        code, _, err = command("jaxgpt", "prepare", *call, *more, "--out", tmp_path / name)
        assert code == 0, err
    compare = (
        "jaxgpt-export",
        "compare",
        "--reference",
        fp32,
        "--model",
        int8_dynamic,
        "--tokens",
        256,
        "--json",
    )
    cut = shutil.copytree(int8_dynamic, tmp_path / "cut")
    (cut / "certificate.json").write_text("{")
    refused = command(*compare, "--data", data, "--model", cut)
    assert_one_line_error(refused, "certificate.json is not JSON")
    refused = command(*compare, "--data", tmp_path / "other")
    assert_one_line_error(refused, "was made with another tokenizer", "that the model was trained on")
    _, out, _ = command(*compare, "--data", tmp_path / "masked")
    inputs, targets = open_dataset(tmp_path / "masked").val_windows(64)
    with torch.no_grad():
        logits = load(fp32)(torch.from_numpy(inputs[:4]))
    wanted = torch.from_numpy(targets[:4]).long()
    wanted[:, -1] = -1  # the comparison takes a window's own tokens alone
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-1)
    assert (wanted >= 0).float().mean() < 0.9
    assert json.loads(out)["reference_loss"] == pytest.approx(float(expected), abs=1e-5)


def test_integers_are_a_gate_of_what_was_made_of_the_training_alone(
    command: Command, qat_run: Path, int8_static_qat: Path, int8_dynamic: Path, data: Path
) -> None:
    for model, gated in ((int8_static_qat, True), (int8_dynamic, False)):
        call = (
            "compare",
            "--reference",
            qat_run,
            "--model",
            model,
            "--data",
            data,
            "--tokens",
            128,
            "--json",
        )
        code, out, err = command("jaxgpt-export", *call)
        assert (code, len(json.loads(out)["gates"])) == (0, int(gated)), err
