"""The console command `jaxgpt-export`: convert or import, quantize, compare, verify, generate, hand on."""

from collections.abc import Sequence

from jaxgpt.shared.console import run

COMMANDS = {
    "convert": "jaxgpt_export.convert:ConvertOptions:convert",
    "import-hf": "jaxgpt_export.interchange.import_hf:ImportHfOptions:import_hf",
    "import-nanogpt": "jaxgpt_export.interchange.import_nanogpt:ImportNanogptOptions:import_nanogpt",
    "quantize": "jaxgpt_export.quantize.command:QuantizeOptions:quantize",
    "compare": "jaxgpt_export.parity.command:CompareOptions:compare_command",
    "verify": "jaxgpt_export.verify:VerifyOptions:verify",
    "generate": "jaxgpt_export.generation.command:GenerateOptions:run",
    "gguf": "jaxgpt_export.interchange.gguf_file:GgufOptions:gguf_command",
    "program": "jaxgpt_export.interchange.program:ProgramOptions:program_command",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `jaxgpt-export`; return its exit code."""
    return run("jaxgpt-export", "Turn a run into artifacts for the CPU, and use them.", COMMANDS, argv)
