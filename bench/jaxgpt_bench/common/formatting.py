"""How figures are printed."""

import math
import re

from jaxgpt_bench.common.rows import SpeedRow, Spread


def rate_text(rate: float) -> str:
    """Print tokens a second: no decimals from 100 on."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def rate_span(rates: Spread, dash: str) -> str:
    """Print a median rate with its least and its largest."""
    return f"{rate_text(rates.median)} ({rate_text(rates.min)}{dash}{rate_text(rates.max)})"


def ceiling_text(row: SpeedRow, span: bool = True) -> str:
    """Print the share of its ceiling that a row reached, and that ceiling.

    Args:
      row: whose share is the median of the rounds', each of its own ceiling; the ceiling is the one that
        belongs to it and to the median rate.
      span: print the least and the largest share too, where they are known.
    """
    shares = row.ceiling_shares if span else None
    between = "" if shares is None else f" ({100 * shares.min:.0f}-{shares.max:.0%})"
    return f"{row.ceiling_share:.0%}{between} of {rate_text(row.shown_ceiling)}"


def time_span(seconds: Spread, dash: str) -> str:
    """Print a median time with its least and its largest, in ms below a second."""
    scale, form, unit = (1e3, ",.0f", "ms") if seconds.median < 1 else (1, ",.2f", "s")
    median, low, high = (format(each * scale, form) for each in (seconds.median, seconds.min, seconds.max))
    return f"{median} {unit} ({low}{dash}{high})"


def span_text(ratio: Spread) -> str:
    """Print a median ratio with its least and its largest."""
    return f"{ratio.median:.2f} ({ratio.min:.2f}-{ratio.max:.2f})"


def shortened(name: str, width: int = 32) -> str:
    """Print a kernel's name: of a long one the beginning and the end."""
    return name if len(name) <= width else f"{name[: width - 15]}...{name[-12:]}"


def signed(value: float) -> str:
    """Print a difference of losses; what rounds to nothing is "0", without a sign."""
    text = f"{value:+.5f}"
    return text if float(text) else "0"


def is_within_error(difference: float, error: float | None) -> bool:
    """Tell whether a difference can't be told from none: it lies within two standard errors."""
    return error is not None and abs(difference) <= 2 * error


def difference_text(difference: float, error: float | None, star: bool = False) -> str:
    """Print a difference of losses with its standard error.

    Args:
      difference: nats.
      error: None where it is not known.
      star: mark what lies within twice the error.
    """
    if error is None:
        return signed(difference)
    text = f"{error:.5f}"
    if float(text):
        return f"{signed(difference)} ± {text}{' *' if star and is_within_error(difference, error) else ''}"
    return "0" if signed(difference) == "0" else f"{signed(difference)} ± less than 0.00001"


def power_text(value: float | None, error: float | None) -> str:
    """Print a figure that ranges over powers of ten, with its standard error; "" where there is none."""
    if value is None:
        return ""
    return f"{value:.1e}" if error is None else f"{value:.1e} ± {error:.0e}"


def share_text(share: float | None, error: float | None) -> str:
    """Print a share in percent with its standard error; "" where there is none."""
    if share is None:
        return ""
    return f"{share:.2%}" if error is None else f"{share:.2%} ± {100 * error:.2f}"


def counted(count: int, word: str) -> str:
    """Say how many."""
    return f"{count} {word}{'' if count == 1 else 's'}"


def verdict_sentence(
    name: str, times_smaller: float, times_faster: float | None, loss: float, unclear: bool
) -> str:
    """Say what quantization does to a model in words that need no knowledge of it.

    Args:
      name: what the model becomes: INT8, int8-dynamic.
      times_smaller: float32 file / its file.
      times_faster: its tokens/s / float32's; None where they were not measured.
      loss: validation loss above float32's, nats a token.
      unclear: which can't be told from none.
    """
    speed = (
        ""
        if times_faster is None
        else f" and writes {times_faster:.1f} times as many tokens a second as float32"
    )
    share = -math.expm1(-loss)  # exp(-loss) is by how much a token's probability changes, in the mean
    change = f"the right next token gets {abs(share):.2%} {'less' if share > 0 else 'more'} likely"
    cost = (
        "what it costs in quality can't be told from nothing"
        if unclear or not signed(loss).strip("0")
        else change
    )
    return f"{name} makes this model {times_smaller:.1f} times smaller{speed}; {cost} ({signed(loss)} nats)."


def without_folders(text: str) -> str:
    """Return a text with the name alone in place of every absolute path: pages and figures are passed on."""
    return re.sub(r"""(?<![\w.:/~])/(?:[^\s/'"=,]+/)*([^\s/'"=,]+)/?""", r"\1", text)
