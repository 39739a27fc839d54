"""The native engine against the PyTorch module, and against itself."""

import ctypes
import dataclasses
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import python
from jaxgpt_bench.speed.random_models import placeholder_tokenizer, random_tensors
from jaxgpt_export.format.artifact import Artifact, read_artifact, write_artifact
from jaxgpt_export.format.scheme import FLOAT32, has_factors
from jaxgpt_export.format.tensors import to_hf_layout
from jaxgpt_export.generation.open_session import open_session
from jaxgpt_export.generation.torch_session import TorchSession
from jaxgpt_export.model.build import as_arrays, build_model
from jaxgpt_export.native.library import call_engine, instruction_sets
from jaxgpt_export.native.native_model import NativeModel
from jaxgpt_export.native.native_session import NativeSession
from jaxgpt_export.quantize.activation import ActivationQuant
from jaxgpt_export.quantize.gptq import round_groups
from jaxgpt_export.quantize.methods import find_method
from jaxgpt_export.quantize.state_dict import quantized_state_dict
from waiting import join

from jaxgpt.generation.generate import generate
from jaxgpt.generation.sampling import Sampling
from jaxgpt.shared.architecture import linear_layers
from jaxgpt.shared.config import ModelConfig
from jaxgpt.shared.errors import UserError

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="no C++ compiler built the engine")

# Odd on purpose: widths that are no multiple of 64, heads of 12 channels, a vocabulary that ends in a tile.
CONFIG = ModelConfig(vocab_size=300, block_size=70, n_layer=2, n_head=4, n_embd=48)
ROTARY = dataclasses.replace(CONFIG, positions="rotary", tied=False)
# Heads that fill tiles of 64, two at a time and in two tiles each: c_attn and attention are one loop then.
PAIRS = ModelConfig(
    vocab_size=300, block_size=70, n_layer=2, n_head=4, n_embd=128, positions="rotary", tied=False
)
LARGE = ModelConfig(vocab_size=300, block_size=70, n_layer=2, n_head=3, n_embd=384)
SHAPES = pytest.mark.parametrize("config", [CONFIG, PAIRS, LARGE], ids=["odd", "pairs", "large"])
WIDE = ModelConfig(vocab_size=4500, block_size=40, n_layer=1, n_head=2, n_embd=64)
# The engine rounds float inputs (weight-only) to 256ths of a 127th of a row's largest, 2^-15 of it, the
# module does not: some of 48 to 192 inputs are that far off in each of nine layers; of the largest logit.
ROUNDED_INPUTS = 3e-4
# Sums of 48 to 1536 float32 products in another order, and float64 between layers where the module has
# float32; of the largest logit. Measured: 4e-7 to 2.4e-6.
FLOAT_SUMS = 1e-5
TEXTS = 5
FOUR_BITS = {"int4-two-level": "int4-dynamic"}
EXACT_KINDS = ("int8-dynamic", "two-level", "int8-static", "int4-dynamic-head", *FOUR_BITS)
FLOAT_KINDS = ("fp32", "fp16", "kept")
KINDS = (*EXACT_KINDS, "int8-weight-only", "int4-weight-only", "int4-weight-only-head", *FLOAT_KINDS)


def artifact_of(kind: str, config: ModelConfig, folder: Path) -> Artifact:
    """Random weights of a kind; two-level is dynamic, smoothed, every input rounded twice.

    kept is int8-weight-only with a layer and the positions in float32.
    """
    tensors = {name: t * 4 if t.ndim == 2 else t for name, t in random_tensors(config).items()}
    if kind == "fp32":
        folder.mkdir()
        content = to_hf_layout(as_arrays(tensors), config)
        write_artifact(folder, config, None, content, placeholder_tokenizer(config.vocab_size))
        return read_artifact(folder)
    method = find_method(
        {"two-level": "int8-dynamic", "kept": "int8-weight-only", **FOUR_BITS}.get(kind, kind)
    )
    layers = linear_layers(config)
    schemes = {
        name: dataclasses.replace(scheme, group_size=16) if scheme.weight_bits == 4 else scheme
        for name, scheme in method.schemes(config).items()
    }
    if kind == "kept":
        schemes |= dict.fromkeys(("h.0.mlp.c_fc", "wpe" if config.positions == "learned" else "wte"), FLOAT32)
    groups = {
        name: round_groups(tensors[f"{name}.weight"], scheme.group_size, has_factors(name, schemes, config))
        for name, scheme in schemes.items()
        if scheme.weight_bits == 4 and f"{name}.weight" in tensors
    }
    smooth = torch.linspace(0.5, 2, 4 * config.n_embd)
    activations = {
        name: ActivationQuant(
            torch.tensor(0.03) if kind == "int8-static" else None,
            smooth if kind == "two-level" and name.endswith("mlp.c_proj") else None,
            0.0,
        )
        for name in layers
        if kind in EXACT_KINDS
    }
    two_level = tuple(layers) if kind.endswith("two-level") else ()
    found = quantized_state_dict(
        config, tensors, method.name, schemes, activations, groups, two_level=two_level
    )
    folder.mkdir()
    content, tokenizer = as_arrays(found.tensors), placeholder_tokenizer(config.vocab_size)
    write_artifact(folder, config, found.quantization, content, tokenizer)
    return read_artifact(folder)


def writable(artifact: Artifact) -> Artifact:
    return dataclasses.replace(artifact, tensors={name: t.copy() for name, t in artifact.tensors.items()})


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def text_of(config: ModelConfig, length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(config.vocab_size, size=length).tolist()


@pytest.mark.parametrize(
    "config", [CONFIG, ROTARY, PAIRS, LARGE], ids=["learned, tied", "rotary, untied", "pairs", "large"]
)
def test_every_instruction_set_gives_the_module_s_logits(
    kind: str, config: ModelConfig, tmp_path: Path
) -> None:
    """The same bits where inputs are rounded to 8 bits: no float in between may differ for that."""
    artifact = artifact_of(kind, config, tmp_path / "a")
    module = build_model(artifact)
    assert module.exact == (kind in EXACT_KINDS)
    texts = [text_of(config, config.block_size if seed == 0 else 33, seed) for seed in range(TEXTS)]
    with torch.inference_mode():
        module_logits = [module(torch.tensor([text]))[0].numpy() for text in texts]
    for isa in instruction_sets():
        model = NativeModel(artifact, 1, isa)
        for seed, (text, expected) in enumerate(zip(texts, module_logits, strict=True)):
            logits = NativeSession(model, cache="fp32").forward(text, all_logits=True)
            if module.exact:
                assert np.array_equal(logits, expected), (isa, seed)
            else:
                bound = FLOAT_SUMS if kind in ("fp32", "fp16") else ROUNDED_INPUTS
                assert np.abs(logits - expected).max() / np.abs(expected).max() <= bound, (isa, seed)


@pytest.mark.parametrize("config", [CONFIG, PAIRS], ids=["learned, tied", "pairs"])
@pytest.mark.parametrize("kind", EXACT_KINDS)
def test_a_module_with_a_float16_cache_gives_the_engine_s_bits(
    kind: str, config: ModelConfig, tmp_path: Path
) -> None:
    artifact = artifact_of(kind, config, tmp_path / "a")
    text, differ = text_of(config, config.block_size), 0
    halves, _ = open_session(artifact, "torch", 1)  # as `generate` opens it
    sessions = [halves, TorchSession(build_model(artifact))]
    sessions += [NativeSession(NativeModel(artifact, 1, isa)) for isa in instruction_sets()]
    for at in range(20, len(text) + 1):
        logits = [s.prefill(text[:20]) if at == 20 else s.decode(text[at - 1]) for s in sessions]
        assert all(np.array_equal(logits[0], native) for native in logits[2:]), at
        differ += not np.array_equal(logits[0], logits[1])
    assert differ  # so it is the cache that makes them equal


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 33])
def test_sums_are_exact_on_extreme_values(isa: str, rows: int) -> None:
    draw = np.random.default_rng(rows)
    for outputs, inputs in ((64, 64), (70, 100), (3, 1), (129, 260)):
        for extreme in (False, True):
            size = 127 * draw.choice([-1, 1], (outputs + rows, inputs))
            values = size if extreme else draw.integers(-127, 128, (outputs + rows, inputs))
            values = np.ascontiguousarray(values, dtype=np.int8)
            weight, x = values[:outputs].copy(), values[outputs:].copy()
            sums = np.empty((rows, outputs), dtype=np.int32)
            arrays = [array.ctypes.data_as(ctypes.c_void_p) for array in (weight, x, sums)]
            call_engine("jaxgpt_sums", isa.encode(), arrays[0], outputs, inputs, arrays[1], rows, arrays[2])
            assert np.array_equal(sums, x.astype(np.int64) @ weight.astype(np.int64).T)


@SHAPES
@pytest.mark.parametrize("cache", ["fp32", "fp16", "int8"])
def test_a_prompt_and_single_steps_give_the_same_bits(
    kind: str, cache: str, config: ModelConfig, tmp_path: Path
) -> None:
    model = NativeModel(artifact_of(kind, config, tmp_path / "a"), 2)
    text = text_of(config, config.block_size)
    whole = NativeSession(model, cache=cache).forward(text, all_logits=True)
    session = NativeSession(model, cache=cache)
    steps = np.concatenate(
        [session.forward(text[:5], all_logits=True), *([session.forward([t]) for t in text[5:]])]
    )
    assert np.array_equal(whole, steps)


@SHAPES
def test_texts_side_by_side_are_the_ones_they_are_alone(
    kind: str, config: ModelConfig, tmp_path: Path
) -> None:
    model = NativeModel(artifact_of(kind, config, tmp_path / "a"), 2)
    many = NativeSession(model, slots=3)
    texts: list[list[int]] = [[], [], []]
    for lengths in ((1, 40, 9), (3, 1, 2), (1, 1, 1)):
        more = [text_of(config, length, seed=length) for length in lengths]
        texts = [text + new for text, new in zip(texts, more, strict=True)]
        slots = [slot for slot, new in enumerate(more) for _ in new]
        together = many.forward([token for new in more for token in new], slots)
        for text, logits in zip(texts, together, strict=True):
            assert np.array_equal(NativeSession(model).prefill(text), logits)


def test_greedy_is_the_first_of_the_largest_logits(tmp_path: Path) -> None:
    artifact = writable(artifact_of("int8-dynamic", CONFIG, tmp_path / "a"))
    weight, scale = artifact.tensors["wte.weight"], artifact.tensors["wte.weight_scale"]
    scale[[5, 130]] *= 8  # stand out, and each has equals in its own tile of 64 and in later ones
    for row, equal in ((5, 6), (5, 70), (130, 131), (130, 299)):
        weight[equal], scale[equal] = weight[row], scale[row]
    text, model = text_of(CONFIG, 60), NativeModel(artifact, 2)
    logits = NativeSession(model).forward(text, all_logits=True)
    session = NativeSession(model)
    found = [
        *session.greedy(text[:40], all_logits=True),
        *(session.greedy([token])[0] for token in text[40:]),
    ]
    assert found == logits.argmax(axis=1).tolist()
    assert {5, 130} & set(found)
    assert {int((row == row.max()).sum()) for row in logits} >= {3}


def test_decode_greedy_is_choosing_step_by_step(kind: str, tmp_path: Path) -> None:
    model = NativeModel(artifact_of(kind, CONFIG, tmp_path / "a"), 2)
    session, steps = NativeSession(model), NativeSession(model)
    text = text_of(CONFIG, 10)
    for each in (session, steps):
        each.prefill(text)
    expected = [7]
    for _ in range(20):
        expected.append(int(steps.greedy(expected[-1:])[0]))
    found = session.decode_greedy(7, 20)
    assert found == expected[1:]
    assert session.length() == steps.length() == len(text) + 20
    session.truncate(len(text))
    end = expected[5]
    assert session.decode_greedy(7, 20, end) == expected[1 : expected.index(end, 1) + 1]
    session.truncate(len(text))
    with pytest.raises(UserError, match="more tokens than the context"):
        session.decode_greedy(7, CONFIG.block_size)
    for token, most in ((2**32 + 7, 1), (-1, 1), (7, 0), (7, 2**31)):
        with pytest.raises(UserError):
            session.decode_greedy(token, most)
    assert session.length() == len(text)
    assert session.decode_greedy(7, 20) == found


def test_a_forgotten_draft_leaves_no_trace(kind: str, tmp_path: Path) -> None:
    model = NativeModel(artifact_of(kind, CONFIG, tmp_path / "a"), 1)
    session, clean = NativeSession(model), NativeSession(model)
    text = text_of(CONFIG, 20)
    session.prefill(text[:10])
    session.forward([1, 2, 3, 4])
    session.truncate(10)
    assert np.array_equal(
        session.forward(text[10:], all_logits=True), clean.forward(text, all_logits=True)[10:]
    )


def test_a_session_without_the_screen_leaves_it_to_the_others(tmp_path: Path) -> None:
    model = NativeModel(artifact_of("int8-dynamic", WIDE, tmp_path / "a"), 1)
    without, screened = NativeSession(model), NativeSession(model)
    without.use_screen(False)
    for token in text_of(WIDE, 30):
        assert without.greedy([token])[0] == screened.greedy([token])[0]
    assert without.exact_outputs == 0 < screened.exact_outputs


@pytest.mark.parametrize("isa", instruction_sets())
def test_the_screened_token_is_the_largest_logit(isa: str, tmp_path: Path) -> None:
    """Also where rows are equal, so that the first must win, and where a few stand out, as in training."""
    artifact = writable(artifact_of("int8-dynamic", WIDE, tmp_path / "a"))
    scale = artifact.tensors["wte.weight_scale"]
    scale[::50] *= 8
    artifact.tensors["wte.weight"][4444] = artifact.tensors["wte.weight"][50]
    scale[4444] = scale[50]
    model = NativeModel(artifact, 2, isa)
    screened, whole = NativeSession(model), NativeSession(model)
    for start in range(12):
        for token in text_of(WIDE, 30, seed=start):
            assert screened.greedy([token])[0] == whole.forward([token])[0].argmax()
        screened.truncate(0)
        whole.truncate(0)
    assert 0 < screened.exact_outputs < 12 * 30 * WIDE.vocab_size / 4


def test_a_screen_that_was_of_no_use_for_one_text_is_tried_for_the_next(tmp_path: Path) -> None:
    """After token 1 all logits but one are equal, after token 2 that one stands out."""
    config = dataclasses.replace(WIDE, positions="rotary", tied=False)
    artifact = writable(artifact_of("int8-dynamic", config, tmp_path / "a"))
    tensors = artifact.tensors
    for name in ("attn", "mlp"):
        tensors[f"h.0.{name}.c_proj.weight_scale"][:] = 1e-20
    tensors["wte.weight"][1] = -tensors["wte.weight"][2]
    for part in ("weight", "weight_scale"):
        tensors[f"lm_head.{part}"][:] = tensors[f"lm_head.{part}"][0]
    tensors["lm_head.weight"][17] = 127 * np.sign(tensors["wte.weight"][2])
    session = NativeSession(NativeModel(artifact, 1))

    def step(token: int) -> int:
        session.truncate(0)
        return int(session.greedy([token])[0])

    assert {step(1) for _ in range(600)} == {0}
    assert session.exact_outputs == 0
    assert {step(2) for _ in range(260)} == {17}
    assert session.exact_outputs > 0


def test_guesses_change_nothing_but_the_steps(int8_dynamic: Path) -> None:
    artifact = read_artifact(int8_dynamic)
    tokenizer, session = artifact.tokenizer(), NativeSession(NativeModel(artifact, 1))
    prompt = "def a(x):\n    return x + 1\ndef a(x):\n    return x + 1\ndef a(x"
    guessed = 0
    for sampling in (Sampling(temperature=0.0), Sampling(temperature=0.7, seed=3), Sampling(0.5, top_k=3)):
        plain = generate(session, tokenizer, prompt, 60, sampling)
        ahead = generate(session, tokenizer, prompt, 60, sampling, draft_tokens=8)
        assert ahead.tokens == plain.tokens
        assert ahead.text == plain.text
        guessed += ahead.guessed
        assert 0 <= ahead.accepted <= ahead.guessed
    assert guessed > 0


def test_sessions_of_several_threads_do_not_mix(tmp_path: Path) -> None:
    model = NativeModel(artifact_of("int8-dynamic", CONFIG, tmp_path / "a"), 2)
    expected = [NativeSession(model).prefill(text_of(CONFIG, 30, seed)) for seed in range(4)]
    found: dict[tuple[int, int], np.ndarray] = {}

    def work(seed: int) -> None:
        session = NativeSession(model)
        for turn in range(5):
            found[seed, turn] = session.prefill(text_of(CONFIG, 30, seed))

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    join(*threads)
    assert all(np.array_equal(logits, expected[seed]) for (seed, _), logits in found.items())
    assert len(found) == 20


def test_float_weights_run_without_pytorch_and_keep_a_float_cache(tmp_path: Path) -> None:
    """An error of the float16 cache would be a hundred times that of the sums."""
    artifact = artifact_of("fp32", CONFIG, tmp_path / "a")
    program = f"""
import sys
from pathlib import Path
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.generation.open_session import open_session
session, engine = open_session(read_artifact(Path({str(artifact.folder)!r})), "auto", 1)
print(engine.startswith("jaxgpt-native ("), "torch" in sys.modules, *session.prefill({text_of(CONFIG, 9)}))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], env=python("")[1], capture_output=True, text=True, check=True
    )
    native, torch_there, *logits = result.stdout.split()
    with torch.inference_mode():
        expected = build_model(artifact)(torch.tensor([text_of(CONFIG, 9)]))[0, -1].numpy()
    assert (native, torch_there, result.stderr) == ("True", "False", "")
    assert np.abs(np.float32(logits) - expected).max() <= FLOAT_SUMS * np.abs(expected).max()
