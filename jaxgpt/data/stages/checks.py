"""What is known when all units are read: what was left out, and whether both splits have documents."""

from collections import Counter

import numpy as np

from jaxgpt.data.documents import working_fraction
from jaxgpt.data.report import ReadReport
from jaxgpt.data.requests.held_out import REASON
from jaxgpt.data.stages.read import PartDocuments, documents_of, duplicate_parts, parts_of
from jaxgpt.data.work.work_folder import Work
from jaxgpt.shared.console import say
from jaxgpt.shared.errors import UserError, brief


def merged_report(work: Work) -> ReadReport:
    """Return what was left out of the whole source."""
    report = ReadReport.from_json(work.plan["report"])
    for summary in work.summaries("read"):
        report.add(ReadReport.from_json(summary["report"]))
    return report


def read_counts(work: Work) -> Counter[str]:
    """Return how many documents were read, were blank, were duplicates; what did not occur has no entry."""
    counts = {
        name: sum(summary[name] for summary in work.summaries("read")) for name in ("documents_read", "blank")
    }
    counts["duplicates"] = sum(
        work.summary("duplicates", part)["duplicates"] for part in range(duplicate_parts(work))
    )
    found = Counter({name: count for name, count in counts.items() if count})
    if work.plan["reading"]["held_out"] is not None:
        found["held_out_pairs"] = merged_report(work).skipped[REASON]
    return found


def check_documents(work: Work) -> None:
    """Say how many documents there are.

    Raises:
      UserError: there are none, a split has none, or pairs are asked for and one is no pair.
    """
    source, answers_only = brief(work.plan["source"]), work.plan["answers_only"]
    sizes = {"train": 0, "val": 0}
    least, most = 1.0, 0.0
    for number in range(len(parts_of(work))):
        documents = documents_of(work, number)
        for split in sizes:
            sizes[split] += len(documents.of(split))
        places = documents.records["place"][documents.kept].astype(np.float64) / 2**64
        if len(places):
            least, most = min(least, float(places.min())), max(most, float(places.max()))
        if answers_only:
            _check_pairs(documents)
    total = sum(sizes.values())
    if not total:
        left_out = merged_report(work).summary()
        raise UserError(
            f"source {source!r} is empty: no document with text in it"
            f"{f' (left out: {left_out})' if left_out else ''}; check the path (of .py files "
            "only functions and classes with a docstring of 3 words or more and 3 lines of code are taken, "
            "or whole files with --code files)"
        )
    if not all(sizes.values()):
        fraction = working_fraction(least, most)
        other = "" if fraction is None else f" or --val-fraction {fraction:g}, which leaves both some"
        raise UserError(
            f"source {source!r} has {total} documents, and the split left "
            f"{sizes['train']} for training, {sizes['val']} for validation; give more text{other}"
        )
    say(f"{source}: {total} documents, {read_counts(work)['duplicates']} duplicates left out")


def _check_pairs(documents: PartDocuments) -> None:
    """Raise UserError where a document is no pair."""
    plain = np.flatnonzero(documents.kept & (documents.records["answer"] < 0))
    for _, texts in documents.batches(plain[:1], 1):
        raise UserError(
            f"--answers-only needs pairs, and {texts[0].decode()[:40]!r}... is none; give .py files "
            "(--include '*.py'), or a table with a --template of several columns, the answer last"
        )
