"""HumanEval: programs for 164 problems, run in the sandbox, and pass@k."""

from collections import Counter
from collections.abc import Sequence

from jaxgpt.generation.sampling import Sampling
from jaxgpt.shared.console import stderr
from jaxgpt_bench.evaluate.answers import speed_of
from jaxgpt_bench.evaluate.functions import measured
from jaxgpt_bench.evaluate.human_eval import STOPS, Problem
from jaxgpt_bench.evaluate.rows import HumanEvalRow, PassAt
from jaxgpt_bench.evaluate.statistics import pass_at_k, smallest_shown
from jaxgpt_bench.evaluate.writers import Writer, write_all
from jaxgpt_bench.sandbox.sandbox import run_programs

KS = (1, 10, 100)
SHOWN_ENDS = 40  # characters of how a program ended, to count by


def evaluate_human_eval(
    writers: Sequence[Writer],
    problems: Sequence[Problem],
    samples: int,
    longest: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> list[HumanEvalRow]:
    """Let each model write so many programs a problem, with the same random numbers; run them all."""
    rows: list[HumanEvalRow] = []
    first: dict[int, list[float]] | None = None
    asked = [problem for problem in problems for _ in range(samples)]
    samplings = [Sampling(temperature, top_p=top_p, seed=seed + place) for place in range(len(asked))]
    for writer in writers:
        texts = write_all(writer, [problem.prompt for problem in asked], longest, samplings, STOPS)
        programs = [problem.program(text.text) for problem, text in zip(asked, texts.written, strict=True)]
        with stderr.status(f"{writer.kind}: {len(programs)} programs run"):
            ends = run_programs(programs)
        passed = Counter({problem.name: 0 for problem in problems})
        for problem, end in zip(asked, ends, strict=True):
            passed[problem.name] += end.passed
        by_k = {
            k: [pass_at_k(samples, passed[problem.name], k) for problem in problems]
            for k in KS
            if k <= samples
        }
        rows.append(
            HumanEvalRow(
                model=writer.name,
                kind=writer.kind,
                samples=samples,
                pass_at=tuple(
                    PassAt(
                        k=k,
                        score=measured(found, None if first is None else first[k]),
                        smallest_shown=smallest_shown(found),
                    )
                    for k, found in by_k.items()
                ),
                passed=dict(passed),
                ends=dict(Counter(end.why.partition(":")[0][:SHOWN_ENDS] for end in ends).most_common()),
                speed=speed_of(texts),
            )
        )
        first = first or by_k
    return rows
