"""Which names are a model's, and which models of the hub are GPT-2s."""

import json
from pathlib import Path

import pytest
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.interchange.hf_folder import read_hf
from jaxgpt_export.interchange.hub import fetch, parse_name
from small_hub import Model, ask_there, small_hub
from tiny_artifacts import tiny_artifact

from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import write_json

pytest.importorskip("huggingface_hub")

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


@pytest.mark.parametrize(
    "name",
    [
        "a--b",
        "a/b..c",
        "a/b.git",
        "a..b/c",
        "a/b--c",
        "a/b-",
        "a./b",
        "-a/b",
        "a/",
        "a" * 97,
        f"{'a' * 97}/b",
    ],
)
def test_a_name_that_the_hub_s_library_refuses_is_no_name(name: str) -> None:
    """It would say so of a call, and that would look like a connection that failed."""
    with pytest.raises(HFValidationError):
        validate_repo_id(name)
    with pytest.raises(UserError, match="is no name of a model"):
        parse_name(f"hub:{name}")


@pytest.mark.parametrize(
    "name", ["gpt2", "a/b", "a-b/c.d_e-1", "a.git/b", "a/b.gitx", "a" * 96, "ab/" + "a" * 96]
)
def test_a_name_that_it_takes_is_one(name: str) -> None:
    validate_repo_id(name)
    assert parse_name(f"hub:{name}@v1") == (name, "v1")


def test_a_model_that_names_no_model_type_is_taken_as_its_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_artifact(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    with small_hub() as hub:
        ask_there(monkeypatch, hub.address)
        write_json(folder / "config.json", config)
        hub.models["some/untyped"] = Model(folder)
        assert read_hf(fetch("some/untyped", "main")[1]).config == read_artifact(folder).config
        write_json(folder / "config.json", {**config, "architectures": ["BertModel"]})
        hub.models["some/untyped"] = Model(folder, commit="c" * 40)
        with pytest.raises(UserError, match="has model_type None, expected 'gpt2'"):
            fetch("some/untyped", "main")
