"""`jaxgpt prepare`: source text -> dataset folder.

    jaxgpt prepare --source stdlib --tokenizer bpe:1024 --out data/stdlib

The source is cut into units of text, which several processes read and encode (stages/). The stages: read,
keep one of equal documents, split by document (for code by file), train the tokenizer on training documents,
encode, drop validation documents that share 50 consecutive tokens with training, write. The folder appears
whole or not at all; shared/dataset/ reads it. The same command goes on where an earlier one was killed.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any, ClassVar, Literal

from jaxgpt.data.make_tokenizer import check_tokenizer_name, is_bpe
from jaxgpt.data.overlap import OVERLAP_TOKENS
from jaxgpt.data.reading.columns import DEFAULT_COLUMN
from jaxgpt.data.reading.token_files import PREFIX
from jaxgpt.data.sources import ReadOptions
from jaxgpt.data.stages.checks import check_documents, merged_report, read_counts
from jaxgpt.data.stages.duplicates import DUPLICATES
from jaxgpt.data.stages.finish import write_dataset
from jaxgpt.data.stages.order import STAGES
from jaxgpt.data.stages.read import READ
from jaxgpt.data.stages.vocabulary import TOKENIZER
from jaxgpt.data.work.crew import Crew
from jaxgpt.data.work.plan import (
    code_sha256,
    jsonable,
    make_plan,
    open_work,
    parts_expected,
    work_folder_of,
)
from jaxgpt.data.work.work_folder import KeptError, Stage, StoppedError, Work
from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError, brief
from jaxgpt.shared.files import check_replaceable, only_writer
from jaxgpt.shared.machine import usable_cores


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    r"""Turn source text into a dataset folder of tokens.

    Attributes:
      source: hub:NAME[@REVISION], stdlib, packages:NAME,..., or a path: a table (.jsonl, .json, .csv,
        and others), a text (.txt, .md, .rst), source code, or a folder of such files; what is
        compressed (.gz, .xz, .bz2, .zst) is read as what it holds. tokens:PATH is what nanoGPT, llm.c or
        modded-nanogpt tokenized: a .bin file or a folder of them.
      out: the dataset folder to write.
      tokenizer: gpt2, bpe:N (N tokens, trained on the training documents), or a folder whose tokenizer is
        taken (an artifact, a data set, a folder of Hugging Face).
      val_fraction: share of the groups (files for code, else documents) that go into validation.
      text_column: column of a table that holds the text.
      template: makes a text of several columns, such as '{instruction}\n{output}'; the last is the answer.
      code: what is taken of .py files: docstring -> code pairs, requests ("Write a function to ...") with
        their programs, or whole files, as of other source code.
      held_out: text file of requests, one a line; programs of which a request asks the same, in whatever
        words around it, are left out of training and validation.
      include: patterns, such as '*.md' 'src/*'; only files of a folder or of packages that fit one are read;
        of packages documentation too.
      exclude: patterns of files that are not read.
      skip_errors: leave out files and rows that are damaged; they are counted and named.
      answers_only: of pairs (.py files, a template of several columns) the loss counts the answer alone; of
        packages' documentation beside them everything.
      workers: processes; 0 takes one for each core that this process may use.
      special: reserved tokens, such as '<|user|>': each is one token where a document has it written out;
        bpe:N counts them in N, other tokenizers get them after their last token.
      overwrite: replace an earlier dataset folder.
      join: help another process, here or on another machine that sees the same files, to make --out; its
        options hold, and only --workers is this one's.
      json: print one JSON document with all figures on stdout.
    """

    out: Path
    source: str = "hub"
    tokenizer: str = "gpt2"
    val_fraction: float = 0.05
    text_column: str = DEFAULT_COLUMN
    template: str = ""
    code: Literal["pairs", "requests", "files"] = "pairs"
    held_out: Path | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    skip_errors: bool = False
    answers_only: bool = False
    workers: int = 0
    special: tuple[str, ...] = ()
    overwrite: bool = False
    join: bool = False
    json: bool = False

    RENAMED: ClassVar[dict[str, str]] = {"--threads": "--workers"}

    @property
    def reading(self) -> ReadOptions:
        """How the source is read."""
        names = [field.name for field in dataclasses.fields(ReadOptions)]
        return ReadOptions(**{name: getattr(self, name) for name in names})


def prepare(options: PrepareOptions) -> Result:
    """Run `jaxgpt prepare`.

    Raises:
      UserError: the source can't be read, is empty, or leaves a split empty.
    """
    if options.join:
        return _join(options)
    _check_options(options)
    with only_writer(options.out):
        return _prepare(options)


def _prepare(options: PrepareOptions) -> Result:
    plan = make_plan(
        options.source,
        options.reading,
        tokenizer=options.tokenizer,
        special=options.special,
        val_fraction=options.val_fraction,
        answers_only=options.answers_only,
    )
    work = open_work(options.out, plan, STAGES)
    try:
        with Crew(work, options.workers or usable_cores()) as crew:
            try:
                if not is_bpe(options.tokenizer):  # needs no text: it is there before the others ask for it
                    work.work_through(TOKENIZER)
                for stage in STAGES:
                    crew.complete(stage)
                    _after(stage, work)
            except StoppedError:  # by a worker, which said why
                work.raise_failure()
                raise
        manifest = _finish(work, options)
    except BaseException as error:
        goes_on = isinstance(error, KeptError | OSError) or not isinstance(error, Exception)
        if not goes_on or parts_expected(work) == 1:
            shutil.rmtree(work.folder, ignore_errors=True)
        raise
    shutil.rmtree(work.folder)
    return Result({**manifest, **merged_report(work).figures()})


def _join(options: PrepareOptions) -> Result:
    """Help to make a data set until there is nothing more to share."""
    folder = work_folder_of(options.out)
    if options.workers < 0:
        raise UserError(f"workers ({options.workers}) must be 0 (as many as cores) or more")
    if not (folder / "plan.json").exists():
        raise UserError(f"nobody prepares {options.out} at the moment; begin without --join")
    units = 0
    work: Work | None = None
    try:
        work = Work(folder)
        if work.plan.get("code_sha256") != code_sha256():
            raise UserError(
                f"{options.out} is prepared by another version of jaxgpt, which may read texts otherwise; "
                "install the same here"
            )
        units = len(work.units)
        with Crew(work, options.workers or usable_cores(), joins=True) as crew:
            for stage in STAGES:
                crew.complete(stage)
    except (StoppedError, FileNotFoundError, UserError) as error:
        if work is None and (folder / "plan.json").exists():
            raise
        if work is not None and work.is_there:
            work.raise_failure()
            if not isinstance(error, StoppedError):
                raise
    say(f"{options.out}: nothing more to share; the process that began it completes it")
    return Result({"joined": str(options.out), "units": units})


def _check_options(options: PrepareOptions) -> None:
    """Raise UserError for what can be seen before the source is opened."""
    check_tokenizer_name(options.tokenizer, options.special)
    inputs = [Path(options.source.removeprefix(PREFIX) or ".")]
    if options.tokenizer != "gpt2" and not is_bpe(options.tokenizer):
        inputs.append(Path(options.tokenizer))
    check_replaceable(options.out, options.overwrite, "manifest.json", inputs)
    if options.workers < 0:
        raise UserError(f"workers ({options.workers}) must be 0 (as many as cores) or more")
    if not 0.0 < options.val_fraction < 1.0:
        raise UserError(f"val_fraction ({options.val_fraction}) must lie between 0 and 1")
    if options.template and options.text_column != DEFAULT_COLUMN:
        raise UserError(
            f"--template and --text-column {options.text_column} both say which text; give one of them"
        )
    _ = options.reading.columns  # of a template


def _after(stage: Stage, work: Work) -> None:
    """Say and check what is known when a stage is done."""
    if stage is READ:
        if not any(summary["documents"] for summary in work.summaries("read")):
            return  # the error says what was left out
        for line in merged_report(work).lines():
            say(f"{brief(work.plan['source'])}: {line}")
    elif stage is DUPLICATES:
        check_documents(work)
    elif stage is TOKENIZER:
        _say_tokenizer(work)


def _say_tokenizer(work: Work) -> None:
    name, found = work.plan["tokenizer"], work.summary(TOKENIZER.name, 0)
    if is_bpe(name) and found["vocab_size"] < int(name.partition(":")[2]):
        say(f"{name}: the text has pairs for {found['vocab_size']} tokens only")
    if sample := found["trained_on"]:
        say(
            f"{name}: trained on {sample['documents']:,} documents chosen by their hashes, "
            f"{sample['bytes'] / 1e6:,.0f} of {sample['of_bytes'] / 1e6:,.0f} MB"
        )


def _finish(work: Work, options: PrepareOptions) -> dict[str, Any]:
    """Write the data set; return its manifest."""
    counts = read_counts(work)
    manifest = write_dataset(work, options.out, options.overwrite, counts, _manifest(work))
    answers = ", of pairs the loss counts the answers alone" if options.answers_only else ""
    say(
        f"{options.out}: {counts['train_tokens']:,} training tokens "
        f"({counts['train_documents']:,} documents), "
        f"{counts['val_tokens']:,} validation tokens ({counts['val_documents']:,} documents; "
        f"{counts['val_overlapping']} dropped for sharing {OVERLAP_TOKENS} tokens with training), "
        f"vocabulary {manifest['tokenizer']['vocab_size']}{answers}"
    )
    return manifest


def _manifest(work: Work) -> dict[str, Any]:
    """Return what the manifest says of source, tokenizer and split."""
    plan, tokenizer = work.plan, work.summary(TOKENIZER.name, 0)
    # What is as it is unless it is asked for has no entry: the same text gives the same file as ever.
    usual = jsonable(ReadOptions())
    asked = {
        name: Path(value).name if name == "held_out" else value
        for name, value in plan["reading"].items()
        if name != "text_column" and value != usual[name]
    }
    rule = "sha256(group)[:8] / 2^64 < val_fraction; a group is a file for code, else a document"
    if plan["tokens"]:
        rule += "; a file of tokens named train or val is that split"
    return {
        "source": plan["source"],
        "revision": plan["revision"],
        "text_column": plan["reading"]["text_column"],
        **({"reading": asked} if asked else {}),
        "tokenizer": {
            **{key: tokenizer[key] for key in ("name", "sha256", "vocab_size")},
            **({"trained_on": tokenizer["trained_on"]} if tokenizer["trained_on"] else {}),
            **({"special": plan["special"]} if plan["special"] else {}),
        },
        "split": {"rule": rule, "val_fraction": plan["val_fraction"], "overlap_tokens": OVERLAP_TOKENS},
    }
