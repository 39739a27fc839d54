"""The console command `jaxgpt-export`: convert or import, quantize, compare, verify, generate, hand on."""

from collections.abc import Sequence

from jaxgpt.shared.console import run

COMMANDS = {
    "convert": "export.convert:ConvertOptions:convert",
    "import-hf": "export.interchange.import_hf:ImportHfOptions:import_hf",
    "import-nanogpt": "export.interchange.import_nanogpt:ImportNanogptOptions:import_nanogpt",
    "quantize": "export.quantize.command:QuantizeOptions:quantize",
    "compare": "export.parity.command:CompareOptions:compare_command",
    "verify": "export.certificate:VerifyOptions:verify",
    "generate": "export.generate:GenerateOptions:run",
    "gguf": "export.interchange.gguf_file:GgufOptions:gguf_command",
    "program": "export.interchange.program:ProgramOptions:program_command",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `jaxgpt-export`; return its exit code."""
    return run("jaxgpt-export", "Turn a run into artifacts for the CPU, and use them.", COMMANDS, argv)
