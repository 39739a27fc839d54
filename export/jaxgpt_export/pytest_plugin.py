"""A pytest plugin: hold your own model to a bound in your own CI.

    pytest --parity-reference=runs/mine --parity-model=runs/mine-int8 --parity-data=data/mine

gives the fixtures `parity_reference`, `parity_model` and `parity_tokens`; a test that asks for one is
skipped, with the reason, where its option is not given:

    from jaxgpt_export.parity import assert_quantization_loss

    def test_int8_costs_little(parity_reference, parity_model, parity_tokens):
        assert_quantization_loss(parity_reference, parity_model, parity_tokens, max_increase=0.003)
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # PyTorch is imported when a fixture is asked for, not by every pytest
    from torch import Tensor

    from jaxgpt_export.parity.comparable import Comparable

OPTIONS = {
    "--parity-reference": "run folder, artifact or Hugging Face folder that is held to be right",
    "--parity-model": "run folder, artifact or Hugging Face folder that is tested",
    "--parity-data": "dataset folder whose validation split is compared on",
}
DEFAULT_TOKENS = 4096


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("jaxgpt parity")
    for option, text in OPTIONS.items():
        group.addoption(option, type=Path, default=None, help=text)
    group.addoption("--parity-tokens", type=int, default=DEFAULT_TOKENS, help="tokens to compare on")


def _given(config: pytest.Config, option: str) -> Any:
    value = config.getoption(option)
    if value is None:
        pytest.skip(f"give {option}: {OPTIONS[option]}")
    return value


def _open(config: pytest.Config, option: str) -> Any:
    from jaxgpt_export.parity.models import open_model

    folder = _given(config, option)
    with _one_line(option):
        return open_model(folder)


@contextlib.contextmanager
def _one_line(option: str) -> Iterator[None]:
    """Fail with the line of an error alone, no traceback."""
    from jaxgpt.shared.errors import UserError

    try:
        yield
    except UserError as error:
        pytest.fail(f"{option}: {error}", pytrace=False)


@pytest.fixture(scope="session")
def parity_reference(pytestconfig: pytest.Config) -> "Comparable":
    """The model of --parity-reference."""
    return _open(pytestconfig, "--parity-reference")


@pytest.fixture(scope="session")
def parity_model(pytestconfig: pytest.Config) -> "Comparable":
    """The model of --parity-model."""
    return _open(pytestconfig, "--parity-model")


@pytest.fixture(scope="session")
def parity_tokens(pytestconfig: pytest.Config) -> "Tensor":
    """Windows (B, T) of the validation split of --parity-data, T the context of --parity-model."""
    import torch
    from jaxgpt.shared.dataset import open_dataset, windows

    from jaxgpt_export.parity.models import require_tokenizer

    data, model = _given(pytestconfig, "--parity-data"), _given(pytestconfig, "--parity-model")
    with _one_line("--parity-data"):
        block_size, dataset = _block_size(model), open_dataset(data)
        require_tokenizer(dataset, model)
        inputs, targets = windows(dataset.val, block_size)
    full = inputs[(targets >= 0).all(axis=1)]
    return torch.from_numpy(full[: max(pytestconfig.getoption("--parity-tokens") // block_size, 1)])


def _block_size(folder: Path) -> int:
    """Return the context of a model folder of any kind."""
    from jaxgpt.shared.errors import damaged
    from jaxgpt.shared.files import read_json
    from jaxgpt.shared.huggingface import ALIASES

    path = folder / "config.json"
    value = read_json(path, "model configuration")
    with damaged(path, "it tells no context; give a run, an artifact, or a Hugging Face folder"):
        model = value.get("model", value)
        aliases = (alias for alias, name in ALIASES.items() if name == "n_positions")
        names = ("block_size", "n_positions", *aliases)
        return int(next(model[name] for name in names if name in model))
