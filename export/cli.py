"""The console command `jaxgpt-export`: convert, quantize, compare, verify, generate."""

from collections.abc import Sequence

from jaxgpt.shared.console import run

COMMANDS = {
    "convert": "export.convert:ConvertOptions:convert",
    "quantize": "export.quantize.command:QuantizeOptions:quantize",
    "compare": "export.parity.command:CompareOptions:compare_command",
    "verify": "export.certificate:VerifyOptions:verify",
    "generate": "export.generate:GenerateOptions:run",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `jaxgpt-export`; return its exit code."""
    return run("jaxgpt-export", "Turn a run into artifacts for the CPU, and use them.", COMMANDS, argv)
