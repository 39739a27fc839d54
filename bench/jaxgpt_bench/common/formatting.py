"""How figures are printed."""


def rate_text(rate: float) -> str:
    """Print tokens a second: no decimals from 100 on."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def signed(value: float) -> str:
    """Print a difference of losses; what rounds to nothing is "0", without a sign."""
    text = f"{value:+.5f}"
    return text if float(text) else "0"
