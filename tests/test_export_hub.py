"""Models by their name on the hub: from a small hub on the loopback interface, whole and broken."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, python, rows
from jaxgpt_export.format.artifact import read_artifact
from jaxgpt_export.format.certificate import read_certificate
from jaxgpt_export.interchange.hub import fetch, parse_name
from jaxgpt_export.native.library import instruction_sets
from jaxgpt_export.pretrained import load_pretrained
from small_gpt2 import gpt2, save
from small_hub import Model, SmallHub, ask_there, small_hub

from jaxgpt.data.make_tokenizer import make_tokenizer
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.files import sha256_of, write_json
from jaxgpt.shared.tokenizer import Tokenizer

pytest.importorskip("transformers")

TEXT = "def"
NOBODY = "http://127.0.0.1:9"  # where nobody listens


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer("bpe:300", [row["text"] for row in rows(40)])


@pytest.fixture(scope="module")
def source(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2."""
    return save(gpt2(tokenizer.vocab_size), tokenizer, tmp_path_factory.mktemp("hub") / "gpt2")


@pytest.fixture(scope="module")
def hub(source: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallHub]:
    scratch = tmp_path_factory.mktemp("broken")
    scaled = gpt2(tokenizer.vocab_size, scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True)
    pickled = save(gpt2(tokenizer.vocab_size), tokenizer, scratch / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    other = save(gpt2(tokenizer.vocab_size), tokenizer, scratch / "other")
    (other / "config.json").write_text('{"model_type": "bert"}')
    with small_hub() as server:
        weights = ("model.safetensors",)
        server.models = {
            "some/gpt2": Model(source, card={"license": "mit", "datasets": ["some/text"]}),
            "some/earlier": Model(source, name="some/gpt2"),
            "some/scaled": Model(save(scaled, tokenizer, scratch / "scaled")),
            "some/pickled": Model(pickled),
            "some/bert": Model(other),
            "some/missing": Model(source, unlisted=weights),
            "some/altered": Model(source, other_bytes=weights),
            "some/altered-vocab": Model(source, other_bytes=("vocab.json",)),
            "some/cut": Model(source, cut=weights),
            **{f"some/status{code}": Model(source, status=code) for code in (401, 403, 404, 429, 500)},
        }
        yield server


def environment_of(hub: SmallHub | None, scratch: Path) -> dict[str, str]:
    address = NOBODY if hub is None else hub.address
    own = {"HF_ENDPOINT": address, "HF_HOME": str(scratch / "hf"), "JAXGPT_CACHE": str(scratch / "cache")}
    return {**python("")[1], **own, "HF_HUB_DISABLE_TELEMETRY": "1"}


def run(
    hub: SmallHub | None, scratch: Path, *arguments: object, **more: str
) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-m", "jaxgpt_export", *map(str, arguments)]
    environment = {**environment_of(hub, scratch), **more}
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)


def import_hf(
    hub: SmallHub | None, scratch: Path, source: str, **more: str
) -> "subprocess.CompletedProcess[str]":
    return run(hub, scratch, "import-hf", "--source", source, "--out", scratch / "art", **more)


LOAD = """
import json, sys
from jaxgpt_export.llm import LLM
llm = LLM.load({source!r}, **{settings!r})
text = llm.generate({text!r}, max_new_tokens=8, temperature=0)
found = {{"kind": llm.kind, "text": text, "folder": str(llm.folder), "torch": "torch" in sys.modules}}
print(json.dumps(found))
"""


def load(hub: SmallHub | None, scratch: Path, source: str, **settings: Any) -> dict[str, Any]:
    """Load a model in a process of its own; return what it says."""
    code = LOAD.format(source=source, settings=settings, text=TEXT)
    line, _ = python(code)
    done = subprocess.run(
        line, env=environment_of(hub, scratch), capture_output=True, text=True, check=False, cwd=scratch
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def here(hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process asks the small hub and has caches of its own, as one with environment_of has."""
    from huggingface_hub import constants

    ask_there(monkeypatch, hub.address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def loaded(hub: SmallHub, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A scratch folder with the caches after some/gpt2 was loaded, and what was said of it."""
    scratch = tmp_path_factory.mktemp("loaded")
    return scratch, load(hub, scratch, "some/gpt2", method="int8-dynamic")


@pytest.mark.skipif(not instruction_sets(), reason="no C++ compiler built the engine")
def test_a_model_is_made_once_and_then_loaded_without_hub_or_pytorch(
    loaded: tuple[Path, dict[str, Any]],
) -> None:
    scratch, first = loaded
    folder = scratch / "cache" / "models" / "some--gpt2" / ("a" * 40) / "int8-dynamic"
    assert first["folder"] == str(folder)
    assert first["kind"] == "int8-dynamic"
    origin = read_certificate(folder)["origin"]
    assert (origin["source"], origin["commit"], origin["license"]) == ("hub:some/gpt2", "a" * 40, "mit")
    card = (folder / "README.md").read_text()
    assert "license: mit" in card
    assert "some/text" in card
    again = load(None, scratch, "some/gpt2")  # nobody is asked
    assert again == {**first, "torch": False}
    assert not list((scratch / "cache").rglob(".tmp-*"))


def test_another_method_takes_the_hub_s_cache_where_the_hub_is_gone(
    loaded: tuple[Path, dict[str, Any]],
) -> None:
    assert load(None, loaded[0], "hub:some/gpt2@main", method="fp32")["kind"] == "fp32"


@pytest.mark.usefixtures("here")
def test_a_revision_that_moved_is_loaded_when_asked_to(
    hub: SmallHub, source: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    hub.models["some/moving"] = Model(source)
    first = load_pretrained("some/moving", "fp32")
    moved = save(gpt2(tokenizer.vocab_size, tie_word_embeddings=False), tokenizer, tmp_path / "moved")
    write_json(moved / "generation_config.json", {"do_sample": True, "top_k": 5})
    hub.models["some/moving"] = Model(moved, commit="b" * 40)
    assert load_pretrained("some/moving", "fp32") == first
    fresh = load_pretrained("some/moving", "fp32", refresh=True)
    assert fresh.parent.name == "b" * 40
    assert read_artifact(fresh).config.tied is False
    assert load_pretrained(f"some/moving@{'a' * 40}", "fp32") == first
    assert load_pretrained("some/moving", "fp32") == fresh
    # As a folder that was kept before artifacts said how they are drawn.
    write_json(fresh / "generation_config.json", {"_from_model_config": True})
    certificate = read_certificate(fresh)
    certificate["files"]["generation_config.json"] = sha256_of(fresh / "generation_config.json")
    write_json(fresh / "certificate.json", certificate)
    assert read_artifact(load_pretrained("some/moving", "fp32")).generation == {}
    assert read_artifact(load_pretrained("some/moving", "fp32", refresh=True)).generation["top_k"] == 5


@pytest.mark.usefixtures("here")
def test_an_artifact_stays_where_making_it_again_fails(
    hub: SmallHub, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.models["some/kept"] = Model(source)
    kept = load_pretrained("some/kept", "fp32")
    (kept / "generation_config.json").write_text("{}")  # another one than the certificate's
    module = importlib.import_module("jaxgpt_export.interchange.import_hf")

    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(module, "import_folder", missing)
    with pytest.raises(UserError, match="torch is needed"):
        load_pretrained("some/kept", "fp32", refresh=True)
    assert (kept / "model.safetensors").exists()
    monkeypatch.undo()


def test_two_processes_that_load_the_same_name_make_it_once(hub: SmallHub, tmp_path: Path) -> None:
    line, _ = python(LOAD.format(source="some/gpt2", settings={}, text=TEXT))
    environment = environment_of(hub, tmp_path)
    both = [
        subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert first["text"] == second["text"]
    said = outputs[0][1] + outputs[1][1]
    assert said.count("KL from transformers fp32") == 1
    # None waits where one is done before the other begins.
    assert said.count("another process is loading some/gpt2; waiting for it") <= 1


@pytest.mark.usefixtures("here")
def test_a_scaled_model_is_imported_and_computes_what_transformers_does(
    command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "art"
    code, _, err = command("jaxgpt-export", "import-hf", "--source", "hub:some/scaled", "--out", out)
    assert code == 0, err
    certificate = read_certificate(out)
    assert certificate["parity"]["against"] == "transformers fp32"
    assert certificate["parity"]["max_abs_logit_diff"] < 1e-5
    assert certificate["origin"]["source"] == "hub:some/scaled"
    assert json.loads((out / "config.json").read_text())["scale_attn_by_inverse_layer_idx"] is False


@pytest.fixture
def no_hub(here: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Takes the small hub away from this process."""
    return lambda: ask_there(monkeypatch, NOBODY)


@pytest.mark.parametrize("asked", ["some/gpt2", "some/earlier", f"some/gpt2@{'a' * 40}"])
def test_what_was_fetched_once_is_found_without_the_hub(
    no_hub: Callable[[], None], capsys: pytest.CaptureFixture[str], asked: str
) -> None:
    model, folder = fetch(*parse_name(asked))
    assert model.name == "some/gpt2"
    no_hub()
    again, same = fetch(*parse_name(asked))
    assert (again.commit, same) == ("a" * 40, folder)
    assert "the connection failed" in capsys.readouterr().err


def test_a_branch_that_moved_is_what_it_was_until_the_new_commit_is_there_whole(
    hub: SmallHub, source: Path, no_hub: Callable[[], None]
) -> None:
    hub.models["some/half"] = Model(source)
    fetch("some/half", "main")
    hub.models["some/half"] = Model(source, commit="b" * 40, unlisted=("model.safetensors",))
    with pytest.raises(UserError, match=r"model\.safetensors was asked of"):
        fetch("some/half", "main")
    no_hub()
    assert fetch("some/half", "main")[0].commit == "a" * 40


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("hub:some/nothing", "some/nothing@main was asked of http://127.0.0.1"),
        ("hub:some/gpt2@v9", "no such revision"),
        ("hub:some/pickled", "pickle alone (pytorch_model.bin)"),
        ("hub:some/bert", "model_type 'bert', expected 'gpt2'"),
        ("hub:some/missing", "model.safetensors was asked of"),
        ("hub:some/altered", "model.safetensors of some/altered is not the file that the hub names"),
        ("hub:some/altered-vocab", "vocab.json of some/altered-vocab is not the file that the hub names"),
        ("hub:some/status401", "did not accept the token (401)"),
        ("hub:some/status403", "refused it (403)"),
        ("hub:some/status404", "404"),
        ("hub:some/status429", "takes no more requests for now (429)"),
        ("hub:some/status500", "a fault of its own (status 500)"),
        ("hub:a/b/c", "is no name of a model"),
        ("hub:", "is no name of a model"),
        ("some/gpt2", "source folder some/gpt2 is missing; check the path, or write hub:some/gpt2"),
    ],
)
def test_what_the_hub_cannot_give_is_one_line_and_leaves_nothing(
    hub: SmallHub, tmp_path: Path, asked: str, part: str
) -> None:
    done = import_hf(hub, tmp_path, asked)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert part in done.stderr
    assert not (tmp_path / "art").exists()


def test_no_network_says_what_was_asked_of_whom(tmp_path: Path) -> None:
    done = import_hf(None, tmp_path, "hub:some/gpt2")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "some/gpt2@main was asked of http://127.0.0.1:9, and the connection failed" in done.stderr
    offline = import_hf(None, tmp_path, "hub:some/gpt2", HF_HUB_OFFLINE="1")
    assert offline.returncode == 2
    assert "HF_HUB_OFFLINE is set" in offline.stderr


def test_weights_of_what_is_no_gpt2_are_never_fetched(hub: SmallHub, tmp_path: Path) -> None:
    hub.asked.clear()
    import_hf(hub, tmp_path, "hub:some/bert")
    assert any("config.json" in asked for asked in hub.asked)
    assert not any("safetensors" in asked for asked in hub.asked)


def test_a_connection_that_breaks_off_is_one_line_and_the_next_try_goes_on(
    hub: SmallHub, source: Path, tmp_path: Path
) -> None:
    hub.models["some/mended"] = Model(source, cut=("model.safetensors",))
    started = time.monotonic()
    done = import_hf(hub, tmp_path, "hub:some/mended")
    assert done.returncode == 2
    assert time.monotonic() - started < 60  # huggingface_hub itself tries five times
    assert "model.safetensors was asked of" in done.stderr.splitlines()[-1]
    assert "the connection failed" in done.stderr.splitlines()[-1]
    hub.models["some/mended"] = Model(source)
    assert import_hf(hub, tmp_path, "hub:some/mended").returncode == 0


@pytest.mark.parametrize("method", ["int8-static", "int4-weight-only", "fp16"])
def test_a_method_that_needs_text_is_one_line(hub: SmallHub, tmp_path: Path, method: str) -> None:
    code = LOAD.format(source="some/gpt2", settings={"method": method}, text=TEXT)
    done = subprocess.run(
        python(code)[0], env=environment_of(hub, tmp_path), capture_output=True, text=True, check=False
    )
    assert f"UserError: method '{method}' is none of fp32, int8-dynamic, int8-weight-only" in done.stderr


def test_a_cache_that_cannot_be_written_is_named(hub: SmallHub, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    code = LOAD.format(source="some/gpt2", settings={}, text=TEXT)
    done = subprocess.run(
        python(code)[0], env=environment_of(hub, tmp_path), capture_output=True, text=True, check=False
    )
    assert "can't be kept in the cache" in done.stderr.splitlines()[-1]
    assert "JAXGPT_CACHE" in done.stderr.splitlines()[-1]


LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"


def test_a_cache_that_is_full_is_one_line_and_nothing_half_made_stays(hub: SmallHub, tmp_path: Path) -> None:
    """No file may pass 60 kB, so that the weights can't be written."""
    code = LIMITED + LOAD.format(source="some/gpt2", settings={}, text=TEXT)
    done = subprocess.run(
        python(code)[0], env=environment_of(hub, tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "can't be kept in the cache" in last
    assert "File too large" in last
    assert not list((tmp_path / "cache").rglob("certificate.json"))
    assert load(hub, tmp_path, "some/gpt2")["kind"] == "int8-dynamic"


def test_an_artifact_of_the_cache_that_was_altered_is_refused(
    hub: SmallHub, loaded: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(loaded[0] / "cache", tmp_path / "cache")
    (weights,) = (tmp_path / "cache").rglob("int8-dynamic/model.safetensors")
    os.truncate(weights, 1000)
    code = LOAD.format(source="some/gpt2", settings={}, text=TEXT)
    done = subprocess.run(
        python(code)[0], env=environment_of(hub, tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "UserError" in done.stderr.splitlines()[-1]
    assert "refresh=True makes it anew" in done.stderr.splitlines()[-1]
    home = next((tmp_path / "cache").rglob("refs")).parent
    (home / ".tmp-of-a-killed-process").mkdir()
    again = load(hub, tmp_path, "some/gpt2", refresh=True)
    assert {**again, "folder": "", "torch": True} == {**loaded[1], "folder": "", "torch": True}
    assert not list(home.glob(".tmp-*"))


@pytest.mark.usefixtures("here")
def test_a_name_that_is_none_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder some/typo is here, and as a model of the hub"):
        load_pretrained("some/typo", "fp32")
    assert not list((tmp_path / "cache").rglob("*typo*"))
