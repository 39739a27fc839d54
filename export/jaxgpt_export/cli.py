"""The console command `jaxgpt-export`: convert or import, quantize, compare, verify, generate, hand on."""

from collections.abc import Sequence

from jaxgpt.shared.entry import Command, CtrlC

COMMANDS = {
    "convert": Command(
        "jaxgpt_export.convert:ConvertOptions:convert",
        "Turn a run's checkpoint into a float32 artifact, a Hugging Face GPT-2 folder with a certificate.",
    ),
    "import-hf": Command(
        "jaxgpt_export.interchange.import_hf:ImportHfOptions:import_hf",
        "Turn a Hugging Face GPT-2 into a float32 artifact.",
    ),
    "import-nanogpt": Command(
        "jaxgpt_export.interchange.import_nanogpt:ImportNanogptOptions:import_nanogpt",
        "Turn a checkpoint of nanoGPT, minGPT or llm.c into a float32 artifact.",
    ),
    "quantize": Command(
        "jaxgpt_export.quantize.command:QuantizeOptions:quantize",
        "Make a quantized artifact from a float32 one.",
    ),
    "compare": Command(
        "jaxgpt_export.parity.command:CompareOptions:compare_command",
        "Compare a model with a reference; exit code 1 when a bound that was given is passed.",
    ),
    "verify": Command(
        "jaxgpt_export.verify:VerifyOptions:verify",
        "Measure an artifact's certificate anew; exit code 1 when a gate fails.",
    ),
    "generate": Command(
        "jaxgpt_export.generation.command:GenerateOptions:run",
        "Continue a prompt with an artifact; the text streams to stdout.",
    ),
    "serve": Command(
        "jaxgpt_export.serve.command:ServeOptions:serve",
        "Serve artifacts over HTTP: OpenAI's API at /v1, a page to try them at /.",
    ),
    "gguf": Command(
        "jaxgpt_export.interchange.gguf_file:GgufOptions:gguf_command",
        "Write a float32 artifact as a GGUF file for llama.cpp.",
    ),
    "onnx": Command(
        "jaxgpt_export.interchange.onnx.command:OnnxOptions:onnx_command",
        "Write a float32 artifact as an ONNX model for ONNX Runtime.",
    ),
    "program": Command(
        "jaxgpt_export.interchange.program:ProgramOptions:program_command",
        "Write an artifact as a torch.export program.",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `jaxgpt-export`; return its exit code."""
    with CtrlC(argv is None):
        from jaxgpt.shared.console import run

        return run("jaxgpt-export", "Turn a run into artifacts for the CPU, and use them.", COMMANDS, argv)
