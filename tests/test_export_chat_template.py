"""Chat templates: found in two places, refused while loading, and given what transformers gives them."""

import datetime
import json
from pathlib import Path

import pytest
from conftest import Command, assert_one_line_error
from jaxgpt_export.serve.chat_template import ChatTemplate, read_chat_template
from tiny_artifacts import tiny_artifact

from jaxgpt.shared.errors import UserError

MESSAGES = [
    {"role": "system", "content": "<b> & 'é' \\n"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
]
TEMPLATES = {
    "loop controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
    "{{ m.role }}{% break %}{% endfor %}",
    "JSON": "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }}"
    "{{ messages | tojson(sort_keys=true) }}",
    "the date": "{{ strftime_now('%Y') }}",
    "a part for trainings": "{% for m in messages %}\n  {% generation %}\n  {{ m.content }}\n"
    "  {% endgeneration %}\n{% endfor %}",
    "no tools": "{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }} {{ bos_token }}",
    "white space": "  {% if true %}\n a\n  {% endif %}\nb\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_gives_what_it_gives_in_transformers(name: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    (right,), _ = utils.render_jinja_template(
        [MESSAGES], chat_template=TEMPLATES[name], add_generation_prompt=True, bos_token="<s>"
    )
    assert ChatTemplate(TEMPLATES[name], Path()).render(MESSAGES, "<s>", "</s>") == right


def test_json_and_date_are_those_of_python() -> None:
    assert ChatTemplate(TEMPLATES["the date"], Path()).render([], "", "") == f"{datetime.date.today():%Y}"
    template = ChatTemplate("{{ messages[0] | tojson }}", Path())
    assert template.render(MESSAGES, "", "") == json.dumps(MESSAGES[0], ensure_ascii=False)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('refuses the messages') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ 1 // 0 }}",
        "{{ cycler | tojson }}",
    ],
)
def test_what_a_template_may_not_do_refuses_the_messages(template: str) -> None:
    with pytest.raises(UserError, match="refuses the messages"):
        ChatTemplate(template, Path()).render(MESSAGES, "", "")


def test_a_template_is_read_from_either_place(tmp_path: Path) -> None:
    assert read_chat_template(tmp_path) is None
    settings = tmp_path / "tokenizer_config.json"

    def found(value: object) -> str | None:
        settings.write_text(json.dumps({} if value is None else {"chat_template": value}))
        template = read_chat_template(tmp_path)
        return template and template.source

    assert found(None) is None
    assert found("one") == "one"
    tools = {"name": "tool_use", "template": "two"}
    assert found([tools, {"name": "default", "template": "three"}]) == "three"
    assert found([tools]) is None
    with pytest.raises(UserError, match="has the chat_template 5, expected a text"):
        found(5)
    (tmp_path / "chat_template.jinja").write_text("of its own")
    assert found("one") == "of its own"


def test_a_broken_template_ends_the_start_with_one_line(command: Command, tmp_path: Path) -> None:
    folder = tiny_artifact(tmp_path)
    (folder / "certificate.json").unlink()  # it does not know the template
    for template, said in (
        ("a\n{% if %}", "line 2"),
        ("{{ a | never }}", "never"),
        ("{% for a in b %}", "endfor"),
    ):
        (folder / "chat_template.jinja").write_text(template)
        result = command("jaxgpt-export", "serve", "--artifact", folder, "--port", 0)
        assert_one_line_error(result, "chat_template.jinja is broken", said, "mend it, or take it out")


def test_a_broken_template_among_the_tokenizer_s_settings_is_told_and_none(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A model that writes texts serves, and others beside it."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ a | never }}"}))
    assert read_chat_template(tmp_path) is None
    assert "is broken (" in " ".join(capfd.readouterr().err.split())
