"""A model's chat template: where it is found, and what it may use, which is what transformers gives it."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError, quoted
from jaxgpt.shared.files import read_json

DEFAULT = "default"  # of several templates


class ChatTemplate:
    """A template that makes a prompt of messages, compiled; it runs in Jinja's sandbox.

    Args:
      source: Jinja's.
      path: of the file that it was read from, for messages.

    Raises:
      UserError: it is no template.
    """

    def __init__(self, source: str, path: Path) -> None:
        self.source = source
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, SyntaxError, ValueError, RecursionError) as error:
            why = str(error)
            if isinstance(error, jinja2.TemplateSyntaxError):
                why = f"line {error.lineno}: {error.message}"
            raise UserError(
                f"the chat template of {path} is broken ({why}); mend it, or take it out, "
                "where the artifact was made of, and make the artifact again"
            ) from None

    def render(self, messages: Sequence[Mapping[str, Any]], begin: str, end: str) -> str:
        """Return the prompt.

        Args:
          messages: each with role and content.
          begin: how the token is written that begins a text.
          end: the same of the one that ends it.

        Raises:
          UserError: the template refuses the messages, or fails with them.
        """
        names = {"tools": None, "documents": None, "bos_token": begin, "eos_token": end}
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **names)
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise UserError(f"the chat template refuses the messages: {error}") from None


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """Read a model's template: chat_template.jinja, else `chat_template` of tokenizer_config.json.

    That is a template, or a list of them by name, of which `default` is taken.

    A broken one of tokenizer_config.json is told, and none.

    Raises:
      UserError: it can't be read, or is none.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), path)
        except (OSError, UnicodeDecodeError) as error:
            message = f"chat template {path} cannot be read ({error}); leave it out, or mend it"
            raise UserError(message) from None
    path = folder / "tokenizer_config.json"
    found = read_json(path, "tokenizer settings").get("chat_template") if path.is_file() else None
    if isinstance(found, list):
        named = [each for each in found if isinstance(each, dict) and each.get("name") == DEFAULT]
        found = named[-1].get("template") if named else None
    if found is not None and not isinstance(found, str):
        raise UserError(
            f"{path} has the chat_template {quoted(found)}, expected a text; mend it, or take it out"
        )
    try:
        return ChatTemplate(found, path) if found else None
    except UserError as error:  # of a file that holds much else: texts need no template
        say(f"WARNING: {error}; /v1/chat/completions is answered with 400 until then")
        return None


class _Generation(jinja2.ext.Extension):
    """{% generation %}, which marks for trainings what an assistant says: here it is what it holds."""

    tags = {"generation"}  # noqa: RUF012 (a set of the class, as in Jinja)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return what stands inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as it is; Jinja's own filter escapes it for HTML."""
    settings: dict[str, Any] = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(value, ensure_ascii=ensure_ascii, **settings)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
