"""Which names are a model's."""

import pytest
from jaxgpt_export.interchange.hub import parse_name

from jaxgpt.shared.errors import UserError

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
