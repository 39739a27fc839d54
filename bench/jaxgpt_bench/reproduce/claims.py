"""What a reproduction shows, in sentences and claims computed from report.json."""

import shlex
from pathlib import Path
from typing import Any

from jaxgpt_bench.common.formatting import rate_text, signed
from jaxgpt_bench.reproduce.tables import best_row, fastest, is_within_error
from jaxgpt_bench.speed.contestant_process import row_name

INT8 = "int8-dynamic"  # what the original measured
THE_ORIGINAL = (
    "an earlier project that trained a GPT-2 from scratch on several T4 GPUs, on flytech/python-codes-25k, "
    "and quantized it with PyTorch's dynamic INT8; its figures are quoted from its description and were not "
    "measured again"
)


def claims(report: dict[str, Any]) -> list[list[str]]:
    """Return what the original claimed, its figures, those of this run and what follows: one row a claim."""
    models = {row["name"]: row for row in report["models"]}
    before, after = models["torch-fp32"], models[INT8]
    theirs = report["original"]
    loss, size, rate = theirs["val_loss"], theirs["size_mb"], theirs["tokens_per_s"]
    shrinks = before["size_mb"] / after["size_mb"]
    increase = signed(after["val_loss"] - before["val_loss"])
    rows = [
        [
            "validation loss, nats",
            f"{loss[0]:.4f} to {loss[1]:.4f} ({loss[1] - loss[0]:+.4f})",
            f"{before['val_loss']:.4f} to {after['val_loss']:.4f} ({increase})",
            "not comparable: another model"
            + ("" if report["data"]["is_the_original_s"] else ", another text"),
        ],
        [
            "size, MB",
            f"{size[0]:.2f} to {size[1]:.2f} ({size[0] / size[1]:.2f} times smaller)",
            f"{before['size_mb']:.2f} to {after['size_mb']:.2f} ({shrinks:.2f} times smaller)",
            "shrinks the file more" if shrinks > size[0] / size[1] else "shrinks the file less",
        ],
    ]
    said = f"{rate[0]:.2f} to {rate[1]:.2f} ({rate[1] / rate[0]:.2f} times)"
    for what, pair, note in speed_pairs(report):
        here = "not measured"
        if pair is None:
            note = ""
        else:
            slow, fast = (total_rate(report, row) for row in pair)
            names = " → ".join(map(row_name, pair))
            here = f"{rate_text(slow)} to {rate_text(fast)} ({fast / slow:.2f} times): {names}"
            note = note or verdict(fast / slow, rate[1] / rate[0])
        rows.append([f"tokens/s, {what}", said, here, note])
        said = "as above"
    return rows


Pair = tuple[dict[str, Any], dict[str, Any]]


def speed_pairs(report: dict[str, Any]) -> list[tuple[str, Pair | None, str]]:
    """Return what is compared, the speed rows before and after (None: not measured), and why no verdict."""
    rows = report["speed"]["rows"]

    def first(engine: str, precision: str, every_logit: bool = False) -> dict[str, Any] | None:
        wanted = (engine, precision, not every_logit, every_logit)
        keys = ("engine", "precision", "cached", "every_logit")
        return next((row for row in rows if tuple(row[key] for key in keys) == wanted), None)

    def both(before: dict[str, Any] | None, after: dict[str, Any] | None) -> Pair | None:
        return None if before is None or after is None else (before, after)

    own = best_row(INT8, rows)
    return [
        (
            "the original's method, with a KV cache: transformers, then quantize_dynamic",
            both(first("transformers", "fp32"), first("torch-quantize-dynamic", INT8)),
            "",
        ),
        (
            "the fastest float32 of any engine, then the fastest INT8 of any",
            both(
                fastest(row for row in rows if row["precision"] == "fp32"),
                fastest(row for row in rows if row["precision"].startswith("int8")),
            ),
            "engines may differ: no verdict",
        ),
        (
            "this project's float32, then its INT8",
            both(best_row("torch-fp32", rows), own),
            "engine and INT8 together: no verdict",
        ),
        (
            "float32 as the original ran it (no KV cache, every logit), then this project's INT8",
            both(first("transformers", "fp32", every_logit=True), own),
            "KV cache, engine and INT8 together: no verdict",
        ),
    ]


def total_rate(report: dict[str, Any], row: dict[str, Any]) -> float:
    """Return tokens a second over the whole time, the prompt's included."""
    return float(report["speed"]["settings"]["tokens"] / row["seconds"]["median"])


def verdict(gain: float, theirs: float) -> str:
    """Say how a gain of speed compares with the original's."""
    if gain < 1:
        return "is slower"
    return "gains more" if gain > theirs else "gains less"


def conclusion(report: dict[str, Any]) -> list[str]:
    """Return what it shows and where it falls short, in a few sentences."""
    models = {row["name"]: row for row in report["models"]}
    before, after = models["torch-fp32"], models[INT8]
    increase, error = after["loss_increase"], after["difference_error"]
    exact = "" if error is None else f" (standard error {error:.5f})"
    unclear = ", which can't be told from none" if is_within_error(increase, error) else ""
    found = [
        f"INT8 makes this model's file {before['size_mb'] / after['size_mb']:.2f} times smaller and changes "
        f"its validation loss by {signed(increase)} nats{exact}{unclear}."
    ]
    theirs = report["original"]["tokens_per_s"]
    words = (
        f"by the original's own method (which reports {theirs[1] / theirs[0]:.2f})",
        "from the fastest float32 to the fastest INT8 of any engine measured",
        "from this project's float32 to its INT8, its C++ engine being part of that",
    )
    gains = [
        f"{total_rate(report, pair[1]) / total_rate(report, pair[0]):.2f} times {how}"
        for (_, pair, _), how in zip(speed_pairs(report), words, strict=False)
        if pair is not None
    ]
    if gains:
        found.append(f"What it gains in speed depends on what is compared: {', '.join(gains)}.")
    held, samples = report["quality"]["parse_held_out"], report["quality"]["parse_samples"]
    can = [other_text_verdict(text) for text in report["other_text"]]
    if after["parse_share"] is not None:
        can.insert(
            0,
            f"{round(after['parse_share'] * samples)} of {samples} INT8 samples parse "
            f"({held['parse']} of {held['texts']} pieces of held-out code do)",
        )
    if can:
        found.append(f"What the model itself can do: {'; '.join(can)}.")
    found.append(
        f"It has {report['train']['parameters'] / 1e6:.1f} million parameters, was trained once and measured "
        "on one machine: what the original's model would lose or gain this does not show."
    )
    return found


def other_text_verdict(text: dict[str, Any]) -> str:
    """Say how float32 and INT8 do on a text from elsewhere, beside xz."""
    losses = {row["name"]: row["loss"] for row in text["rows"]}
    first, xz = text["rows"][0], text["xz_bits_per_byte"]
    how = "worse than xz: there it fails" if first["bits_per_byte"] > xz else "better than xz"
    int8 = f", {losses[INT8]:.4f} in INT8" if INT8 in losses else ""
    return (
        f"on {text['file']} it loses {first['loss']:.4f} nats a token in float32{int8} "
        f"({min(losses.values()):.4f} to {max(losses.values()):.4f} over all models), "
        f"{first['bits_per_byte']:.3f} bits a byte where xz -9e takes {xz:.3f}, {how}"
    )


def memorized(report: dict[str, Any]) -> str:
    """Say what generated text has word for word from the training text, beside held-out code."""
    held, *models = report["memorization"]["summary"]
    medians = [row["median_tokens"] for row in models]
    return (
        "The longest run of tokens that a sample has word for word from the training text is "
        f"{max(row['max_tokens'] for row in models)} tokens long (medians by model {min(medians):g} to "
        f"{max(medians):g}); held-out code itself has {held['max_tokens']} (median "
        f"{held['median_tokens']:g})."
    )


def overlap(report: dict[str, Any]) -> str:
    """Say how much of the validation text stands in the training text."""
    found = report["memorization"]["overlap"]
    dropped = f"after prepare dropped {found['dropped']:,} that did; " if "dropped" in found else ""
    return (
        f"{found['sharing']:,} of {found['documents']:,} validation documents share {found['run_tokens']} "
        f"tokens in a row with the {report['memorization']['train_tokens']:,} training tokens, {dropped}"
        f"{found['too_short']:,} are too short to."
    )


def counted(count: int, word: str) -> str:
    """Say how many."""
    return f"{count} {word}{'' if count == 1 else 's'}"


def what_it_was_trained_on(report: dict[str, Any]) -> str:
    """Say what text it was, and whether it is the original's."""
    data = report["data"]
    if data["is_the_original_s"]:
        return "flytech/python-codes-25k, the original's data set, deduplicated and split anew"
    source = str(data["source"])
    if source == "stdlib":
        text = "functions of the Python standard library with their docstrings"
    elif source.startswith("packages:"):
        count = len(source.removeprefix("packages:").split(","))
        text = f"functions of {count} installed Python packages with their docstrings"
    else:
        text = f"text of the user's own ({Path(source).name})"
    return f"{text}: not the original's data set"


def commands(report: dict[str, Any]) -> list[str]:
    """Return the lines that run it again, from the project's folder; the text from elsewhere is optional."""
    cuda = "cuda," if report["preset"] == "gpu" else ""
    words = shlex.split(report["command"])
    others = [at for at, word in enumerate(words) if word == "--other-text"]
    left_out = {*others, *(at + 1 for at in others)}
    lines = [
        "python3 -m venv .venv && source .venv/bin/activate",
        f"pip install -c constraints.txt -e '.[train,{cuda}export,bench,peers]'",
        shlex.join(word for at, word in enumerate(words) if at not in left_out),
    ]
    for text in report["other_text"]:
        given = f"{text['file']}={text['about']}" if text["about"] else text["file"]
        lines += [
            "",
            "# optional, the loss on text from elsewhere: a table with a column text, here the one of sha256",
            f"# {text['sha256']}",
            f"#   {shlex.join(['--other-text', given])}",
        ]
    return lines


def limits(report: dict[str, Any]) -> list[str]:
    """Return where a run falls short, from its figures."""
    train, data, speed = report["train"], report["data"], report["speed"]
    samples = report["quality"]["parse_samples"]
    points, rounds = (
        counted(len(train["curve"]["val"]), "validation point"),
        counted(speed["rounds"], "round"),
    )
    found = []
    if not data["is_the_original_s"]:
        found.append(f"It was trained on {what_it_was_trained_on(report)}.")
    found += [
        "Neither losses nor, strictly, what quantization adds to them are comparable across models and "
        "texts; the original's figures stand here for orientation.",
        f"The model has {train['parameters'] / 1e6:.1f} million parameters and saw "
        f"{train['tokens_seen'] / 1e6:.1f} million tokens; the original's file of 620 MB is that of a GPT-2 "
        "of 124 million and more. Sizes and speeds are therefore compared as ratios.",
        "Errors are standard errors over windows of one validation split, for one training: another seed, or "
        "another text, is not in them.",
        f"The checkpoint was chosen by its loss on the whole validation split ({points}), "
        f"of which the quality figures are measured on {report['quality']['val_tokens']:,} tokens, "
        f"{report['quality']['windows']}; windows do not overlap, so first tokens have little context.",
        "Quality and samples are those of the PyTorch module; speed is that of each model's fastest engine, "
        "for INT8 the native one, whose arithmetic differs a little. So the tables say how many greedy "
        "tokens are those of float32.",
        "int8-static-qat was trained on for further steps: its difference from the reference is not the "
        "cost of rounding, its difference from fp32-qat is.",
        f"Speed was measured on one machine ({speed['machine']['cpu']}, {speed['machine']['cores']} cores, "
        f"possibly shared), batch 1, {rounds}; ratios travel better than times. A small "
        "model fits the caches, which favours float32.",
        "The samples are chosen by a seed, not by taste, and the prompts given as they stand: a model that "
        "was trained on docstrings may go on with the sentence before it begins the code. The text of a "
        "small model looks like Python; it does not solve tasks.",
    ]
    if samples:
        bound = 2 * (2 * 0.25 / samples) ** 0.5
        found.insert(
            4,
            f"The share of samples that parse rests on {samples} texts a model: one text is "
            f"{100 / samples:.0f} percentage points, and two shares that differ by less than about "
            f"{100 * bound:.0f} percentage points can't be told apart.",
        )
    return found
