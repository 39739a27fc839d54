"""Kinds of kernels: which kernel is a product, attention, a reduction.

What a library's kernel does stands in its name (LIBRARY). What XLA generates is told by the HLO instruction
that it comes from, and by its name (GENERATED) where no instruction is known. What nothing tells is "other".
"""

import re

from jaxgpt_bench.profile.hlo import ATTENTION, Instruction, Program

PRODUCTS = "products"
FORWARD, BACKWARD = "attention forward", "attention backward"
REDUCTIONS, ELEMENTWISE = "reductions", "elementwise"
MOVES = "copies, transposes, slices"
GATHERS = "gathers, scatters"
COLLECTIVES = "collectives"
OPTIMIZER = "optimizer"
OTHER = "other"
NO_KERNEL = "no kernel"  # the device waits: for the host, or for the next kernel
CONTROL = "control flow"  # loops and calls, whose time is that of what they hold
KINDS = (FORWARD, BACKWARD, REDUCTIONS, ELEMENTWISE, MOVES, GATHERS, COLLECTIVES, OPTIMIZER, OTHER, NO_KERNEL)

# The first pattern that is found in a kernel's name tells its kind.
LIBRARY: tuple[tuple[str, str], ...] = (
    (r"^triton_(red|per)_fused", REDUCTIONS),  # of torch.compile, which names them by what they fuse
    (r"^triton_poi_fused", ELEMENTWISE),
    (r"multi_tensor_apply|FusedAdam", OPTIMIZER),  # of PyTorch
    (r"^nccl", COLLECTIVES),
    (
        r"(?i)(flash|fmha|sdpa|attention|cudnn::fusion).*(bprop|bwd|backward|dgrad|dot_do_o|convert_dq)",
        BACKWARD,
    ),
    (r"fmha_cutlassB|dot_do_o|convert_dq_to", BACKWARD),
    (r"(?i)flash_fprop|flash_fwd|flash.*fwd|fmha_cutlassF|fmha|sdpa|dot_product_attention", FORWARD),
    (r"(?i)gemm|gemv|nvjet|cutlass|xmma|cublas|splitKreduce|s16816|onednn", PRODUCTS),
    (r"(?i)^mem(cpy|set)", MOVES),
)
GENERATED: tuple[tuple[str, str], ...] = (
    (r"all[-_]reduce|all[-_]gather|reduce[-_]scatter|collective|all[-_]to[-_]all", COLLECTIVES),
    (r"^(dot|convolution)\b|^triton_(gemm|tem)|_dot_", PRODUCTS),
    (r"scatter|gather|embedding|indexing", GATHERS),
    (r"reduce|triton_softmax", REDUCTIONS),
    (r"^while|^call|^conditional", CONTROL),
    (
        r"^copy|^input_transpose|^transpose|^(input_)?concatenate|^(wrapped_|input_)?slice|^bitcast_copy",
        MOVES,
    ),
    (r"dynamic[-_]update[-_]slice|^(loop_|wrapped_)(copy|transpose|slice|pad|concatenate)", MOVES),
    (r"^loop_|^wrapped_|^input_|fusion|elementwise", ELEMENTWISE),
)
# In what a product multiplies, by its kernel's name. nvjet's three letters are its operands, sums and
# results: t is bfloat16, h is float16, s float32; 1688 without a dtype is TensorFloat-32.
DTYPES: tuple[tuple[str, str], ...] = (
    (r"tf32", "tf32"),
    (r"e4m3|e5m2|fp8", "fp8"),
    (r"bf16|bfloat16|nvjet_(sm\d+_)?t", "bf16"),
    (r"fp16|(?<!b)f16|__half|h884|h1688|hgemm|nvjet_(sm\d+_)?h", "fp16"),
    (r"imma|i8i8|s8_|int8", "int8"),
    (r"s1688gemm|nvjet_(sm\d+_)?s", "tf32"),
    (r"sgemm|f32f32_f32f32|simt|ffma", "fp32"),
)
HLO_DTYPES = {"bf16": "bf16", "f16": "fp16", "f32": "fp32", "f64": "fp64", "s8": "int8", "u8": "int8"}

# Opcodes that change no number.
MOVING = {
    *("copy", "transpose", "reshape", "bitcast", "concatenate", "broadcast", "pad", "reverse", "iota"),
    *(
        "slice",
        "dynamic-slice",
        "dynamic-update-slice",
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
    ),
}
CONTROL_FLOW = {"while", "call", "conditional", "async-start", "async-done"}
COLLECTIVE = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")


def kind_of(name: str, instruction: Instruction | None, program: Program, gpu: bool) -> str:
    """Return the kind of a kernel.

    Args:
      name: of the kernel.
      instruction: that it belongs to; None where that is not known.
      program: that the instruction is of.
      gpu: JAX multiplies float32 as TensorFloat-32 there, unless the kernel's name says otherwise.
    """
    found = _first(LIBRARY, name)
    if found is None and instruction is not None:
        found = _of_instruction(instruction, program)
    found = found or _first(GENERATED, name) or OTHER
    updates = instruction is not None and is_update(instruction, program)
    if found == PRODUCTS:
        dtype = _product_dtype(name, instruction, program, gpu)
        return f"{PRODUCTS}, {dtype}" + (f", {OPTIMIZER}" if updates else "")
    return OPTIMIZER if updates and found in (REDUCTIONS, ELEMENTWISE, MOVES) else found


def is_update(instruction: Instruction, program: Program) -> bool:
    """Whether an instruction belongs to what follows the gradients: their norm, clipping, the optimizer.

    JAX writes jvp into the names of everything that it differentiates; sums of gradients have none, and are
    known by their source.
    """
    name = program.op_name(instruction)
    return bool(name) and "jvp(" not in name and "gradients.py" not in program.source(instruction, "jaxgpt")


def product_dtype(kind: str) -> str | None:
    """Return the dtype of a kind of products; None for other kinds."""
    return kind.split(", ")[1] if kind.startswith(PRODUCTS) else None


def _first(patterns: tuple[tuple[str, str], ...], name: str) -> str | None:
    return next((kind for pattern, kind in patterns if re.search(pattern, name)), None)


def _of_instruction(instruction: Instruction, program: Program) -> str | None:
    """Tell a kind by what an instruction computes."""
    opcodes = {each.opcode for each in program.inside(instruction)}
    if instruction.target.startswith(ATTENTION):
        return BACKWARD if "Backward" in instruction.target else FORWARD
    if instruction.opcode in CONTROL_FLOW:
        return CONTROL
    if any(opcode.startswith(COLLECTIVE) for opcode in opcodes):
        return COLLECTIVES
    if "dot" in opcodes or "gemm" in instruction.target or "matmul" in instruction.target:
        return PRODUCTS
    if "scatter" in opcodes:
        return GATHERS
    if {"reduce", "reduce-window"} & opcodes:
        return REDUCTIONS
    if "gather" in opcodes:
        return GATHERS
    if opcodes <= MOVING:
        return MOVES
    return ELEMENTWISE if instruction.opcode != "custom-call" else None


def _product_dtype(name: str, instruction: Instruction | None, program: Program, gpu: bool) -> str:
    found = _first(DTYPES, name)
    if found is None and instruction is not None:
        found = HLO_DTYPES.get(program.dtype(instruction))
        found = "tf32" if found == "fp32" and gpu else found
    return found or "dtype unknown"
