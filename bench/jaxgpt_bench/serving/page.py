"""What docs/serving.md says of speed."""

from jaxgpt_bench.common.tables import table
from jaxgpt_bench.serving.options import SERVED, SLOTS
from jaxgpt_bench.serving.rows import LOAD, PROMPTS, LoadRow, PromptRow, ServingFigures

OURS = "jaxgpt"
MANY = 8  # clients of which the text speaks


def markdown_block(figures: ServingFigures) -> str:
    """Return the figures of `jaxgpt-bench serving` as Markdown: in words, then as tables."""
    settings, machine = figures.settings, figures.machine
    model = f"the shape of {settings['preset']}, random weights" if settings["preset"] else "a trained model"
    first = (
        f"{model[0].upper()}{model[1:]}, {settings.get('kind', SERVED)}, {machine.cores} cores "
        f"({machine.cpu}), prompts of {settings['prompt_tokens']} random tokens, texts of "
        f"{settings['tokens']}, {settings.get('slots', SLOTS)} side by side, nothing drafted; medians of "
        f"{settings['rounds']} interleaved rounds and their span."
    )
    parts = [first, " ".join(_sentences(figures)), table(LOAD, figures.load).markdown()]
    if figures.prompts:
        parts += [
            " ".join(map(_prompt_sentence, figures.prompts)),
            table(PROMPTS, figures.prompts).markdown(),
        ]
    return "\n\n".join(part for part in parts if part)


def _sentences(figures: ServingFigures) -> list[str]:
    found = []
    one = _row(figures, OURS, 1)
    if figures.alone_tokens_per_s is not None and one is not None:
        share = one.tokens_per_s.median / figures.alone_tokens_per_s.median
        found.append(
            f"One client gets {share:.0%} of the {figures.alone_tokens_per_s.median:.0f} tokens/s that "
            "`generate` writes by itself in the same rounds."
        )
    for temperature in dict.fromkeys(row.temperature for row in figures.load):
        found += _many_clients(figures, temperature)
    return found


def _many_clients(figures: ServingFigures, temperature: float) -> list[str]:
    one, many = (_row(figures, OURS, clients, temperature) for clients in (1, MANY))
    if one is None or many is None:
        return []
    ratio = many.tokens_per_s.median / one.tokens_per_s.median
    where = "Greedy" if temperature == 0 else f"At temperature {temperature:g}"
    others = []
    for server in dict.fromkeys(row.server for row in figures.load if row.server != OURS):
        theirs = _row(figures, server, MANY, temperature)
        if theirs is not None:
            others.append(
                f"{many.tokens_per_s.median / theirs.tokens_per_s.median:.2f} times what {server} gives"
            )
    beside = f", {' and '.join(others)} them" if others else ""
    return [f"{where}, {MANY} clients together get {ratio:.1f} times as much as one{beside}."]


def _row(figures: ServingFigures, server: str, clients: int, temperature: float = 0.0) -> LoadRow | None:
    """Return the row of texts that share nothing."""
    key = (server, clients, temperature, 0)
    rows = (
        row for row in figures.load if (row.server, row.clients, row.temperature, row.shared_tokens) == key
    )
    return next(rows, None)


def _prompt_sentence(row: PromptRow) -> str:
    return (
        f"{row.server}: a prompt of {row.prompt_tokens} tokens has its first token after "
        f"{row.first_ms.median:.0f} ms, and after {row.again_ms.median:.0f} ms when it comes again with "
        f"others at its end; while such prompts arrive, the 99th percentile of four running texts' waits for "
        f"a token is {row.busy_p99_ms.median / row.quiet_ms.median:.1f} times their median in the quiet."
    )
