"""What `jaxgpt-bench serving` measures."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxgpt_bench.common.json_data import JsonData
from jaxgpt_bench.common.rows import Provenance, Spread
from jaxgpt_bench.common.tables import Column


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadRow(JsonData):
    """Clients that ask one server at once, over all rounds.

    Attributes:
      server: its name.
      clients: how many, each with one request at a time.
      temperature: 0 is greedy.
      shared_tokens: with which all prompts of a round begin, new ones each round; 0: they share nothing.
      tokens_per_s: of all clients together, a value a round.
      first_token_ms: median of a round's requests, a value a round.
      first_token_p99_ms: the 99th percentile of all.
      between_tokens_ms: median time between two tokens of a text, all rounds.
      between_tokens_p99_ms: the 99th percentile.
      client_cpu_share: of one core, that the clients themselves took.
    """

    server: str
    clients: int
    temperature: float
    tokens_per_s: Spread
    first_token_ms: Spread
    first_token_p99_ms: float
    between_tokens_ms: float
    between_tokens_p99_ms: float
    client_cpu_share: float
    shared_tokens: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptRow(JsonData):
    """Long prompts, and the texts that run beside them.

    Attributes:
      server: its name.
      prompt_tokens: of a long prompt.
      first_ms: time to first token of a prompt that is new, a value a round.
      again_ms: the same prompt again with 8 other tokens at its end.
      quiet_ms: median time between tokens of 4 texts that run alone.
      busy_p99_ms: the 99th percentile while long prompts arrive one after the other.
    """

    server: str
    prompt_tokens: int
    first_ms: Spread
    again_ms: Spread
    quiet_ms: Spread
    busy_p99_ms: Spread


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingFigures(Provenance):
    """A file of `jaxgpt-bench serving`.

    Attributes:
      alone_tokens_per_s: of `generate` in one process, greedy, in the same rounds; None where only others'
        servers were measured.
      load: a row a server, number of clients and temperature.
      prompts: a row a server.
      settings: of the run.
    """

    alone_tokens_per_s: Spread | None
    load: tuple[LoadRow, ...]
    prompts: tuple[PromptRow, ...]
    settings: dict[str, Any]


def _span(spread: Spread, digits: int = 1) -> str:
    return f"{spread.median:.{digits}f} ({spread.min:.{digits}f}-{spread.max:.{digits}f})"


LOAD: Sequence[Column[LoadRow]] = (
    Column("server", lambda row: row.server),
    Column("clients", lambda row: str(row.clients)),
    Column("temperature", lambda row: f"{row.temperature:g}"),
    Column("shared", lambda row: str(row.shared_tokens or "")),
    Column("tokens/s", lambda row: _span(row.tokens_per_s, 0)),
    Column("first token, ms", lambda row: _span(row.first_token_ms)),
    Column("p99", lambda row: f"{row.first_token_p99_ms:.1f}"),
    Column("between tokens, ms", lambda row: f"{row.between_tokens_ms:.2f}"),
    Column("p99 ", lambda row: f"{row.between_tokens_p99_ms:.1f}"),
    Column("clients' CPU", lambda row: f"{row.client_cpu_share:.0%}"),
)
PROMPTS: Sequence[Column[PromptRow]] = (
    Column("server", lambda row: row.server),
    Column("prompt", lambda row: str(row.prompt_tokens)),
    Column("first token, ms", lambda row: _span(row.first_ms)),
    Column("the same again, ms", lambda row: _span(row.again_ms)),
    Column("4 texts, ms between tokens", lambda row: _span(row.quiet_ms, 2)),
    Column("p99 while prompts arrive", lambda row: _span(row.busy_p99_ms, 2)),
)
