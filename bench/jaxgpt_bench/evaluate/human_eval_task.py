"""HumanEval: programs for 164 problems, run in the sandbox, and pass@k."""

from collections import Counter
from collections.abc import Iterator, Sequence

from jaxgpt.generation.sampling import Sampling
from jaxgpt.shared.console import stderr
from jaxgpt.shared.errors import UserError
from jaxgpt_bench.evaluate.answers import speed_of
from jaxgpt_bench.evaluate.functions import measured
from jaxgpt_bench.evaluate.human_eval import STOPS, TOO_LONG, Problem
from jaxgpt_bench.evaluate.rows import HumanEvalRow, PassAt
from jaxgpt_bench.evaluate.statistics import pass_at_k, smallest_shown
from jaxgpt_bench.evaluate.writers import Writer, write_all
from jaxgpt_bench.sandbox.sandbox import run_programs

KS = (1, 10, 100)


def evaluate_human_eval(
    writers: Sequence[Writer],
    problems: Sequence[Problem],
    samples: int,
    longest: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> Iterator[HumanEvalRow]:
    """Let each model write so many programs a problem, with the same random numbers; run them all.

    A problem that a model's context does not hold is not solved: its programs end as TOO_LONG.

    Yields:
      A model's row as soon as its programs were run.

    Raises:
      UserError: a model's context holds no problem at all.
    """
    first: dict[int, list[float]] | None = None
    asked = [problem for problem in problems for _ in range(samples)]
    samplings = [Sampling(temperature, top_p=top_p, seed=seed + place) for place in range(len(asked))]
    for writer in writers:
        held = fitting(writer, problems)
        written = [place for place, problem in enumerate(asked) if problem.name in held]
        prompts = [asked[place].asked for place in written]
        texts = write_all(writer, prompts, longest, [samplings[place] for place in written], STOPS)
        programs = [
            asked[place].program(text.text) for place, text in zip(written, texts.written, strict=True)
        ]
        with stderr.status(f"{writer.kind}: {len(programs)} programs run"):
            ends = run_programs(programs)
        passed = Counter({problem.name: 0 for problem in problems})
        for place, end in zip(written, ends, strict=True):
            passed[asked[place].name] += end.passed
        how = Counter(end.why for end in ends)
        how.update({TOO_LONG: len(asked) - len(written)} if len(written) < len(asked) else {})
        by_k = {
            k: [pass_at_k(samples, passed[problem.name], k) for problem in problems]
            for k in KS
            if k <= samples
        }
        yield HumanEvalRow(
            model=writer.name,
            kind=writer.kind,
            samples=samples,
            pass_at=tuple(
                PassAt(
                    k=k,
                    score=measured(found, None if first is None else first[k]),
                    smallest_shown=smallest_shown(found, None if first is None else first[k]),
                )
                for k, found in by_k.items()
            ),
            passed=dict(passed),
            ends=dict(how.most_common()),
            speed=speed_of(texts),
        )
        first = first or by_k


def fitting(writer: Writer, problems: Sequence[Problem]) -> frozenset[str]:
    """Return the problems that leave room for a token in a model's context; UserError where none does."""
    block_size = writer.session.block_size
    found = [each.name for each in problems if len(writer.tokenizer.encode(each.asked)) <= block_size]
    if not found:
        raise UserError(
            f"{writer.name}: the model's context holds {block_size} tokens, and every problem has more"
        )
    return frozenset(found)
