"""Reads the text of a compiled step: what each instruction multiplies, reads, writes, and who wrote it.

    program = Program(compiled.as_text())
    program["loop_add_fusion.4"]      # the instruction that a kernel belongs to
    program.flops(...), program.bytes(...), program.source(...)

JAX gives FLOPs and bytes of a whole step only; a profile needs them of each kernel. What a later version
prints in another way is unknown here, never an error.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

HEADER = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)")
SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
NAME = re.compile(r"%([\w.\-]+)")
OP_NAME = re.compile(r'op_name="([^"]*)"')
FRAME = re.compile(r"stack_frame_id=(\d+)")
TARGET = re.compile(r'custom_call_target="([^"]*)"')
CALLED = re.compile(r"\b(?:calls|to_apply|body)=%([\w.\-]+)")
CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{([\d,]*)\}|ensions":\s*\[([^\]]*)\])')
SCORES = re.compile(r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([^\]]*)\]')
TABLE_ROW = re.compile(r'(\d+) (?:"(.*)"|\{(.*)\})$')
SLICES = ("slice", "dynamic-slice", "gather")
ATTENTION = "__cudnn$fmha"
HOPS = 4  # to users, for what XLA's own passes left without a name


class Shape(NamedTuple):
    """An array of the HLO."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes that it takes."""
        bits = re.search(r"\d+", self.dtype)  # of bf16, f32, f8e4m3fn; pred has none
        return math.prod(self.dims) * max(int(bits[0]) if bits else 8, 8) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of the HLO.

    Attributes:
      name: unique in the program.
      opcode: such as fusion, dot, custom-call.
      results: what it returns, a tuple's elements one by one.
      operands: names of its operands.
      rest: attributes as they are written.
    """

    name: str
    opcode: str
    results: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str

    @property
    def target(self) -> str:
        """What a custom call calls; "" for other instructions."""
        found = TARGET.search(self.rest)
        return found[1] if found else ""

    @property
    def called(self) -> str | None:
        """The computation of a fusion, a call or a loop."""
        found = CALLED.search(self.rest)
        return found[1] if found else None

    @property
    def op_name(self) -> str:
        """JAX's name of the operation, with the transformations around it."""
        found = OP_NAME.search(self.rest)
        return found[1] if found else ""


def closing(text: str) -> int:
    """Return the index after the bracket that closes the first one of a text."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if character == ")" and depth == 0:
            return index + 1
    return len(text)


def parse_instruction(line: str) -> Instruction | None:
    """Read one line: `%name = TYPE opcode(%operand, ...), attributes`; None where it is none."""
    found = INSTRUCTION.match(line)
    if not found:
        return None
    name, text = found.groups()
    end = closing(text) if text.startswith("(") else text.find(" ")
    types, rest = text[:end], text[end:].lstrip()
    opcode, bracket, _ = rest.partition("(")
    if end < 0 or not bracket or not re.fullmatch(r"[\w\-]+", opcode):
        return None
    inside = closing(rest)
    shapes = tuple(
        Shape(dtype, tuple(int(size) for size in dims.split(",") if size))
        for dtype, dims in SHAPE.findall(types)
    )
    return Instruction(name, opcode, shapes, tuple(NAME.findall(rest[len(opcode) : inside])), rest[inside:])


class Program:
    """A compiled module.

    Args:
      text: of `jax.stages.Compiled.as_text()`.
    """

    def __init__(self, text: str) -> None:
        self._instructions: dict[str, Instruction] = {}
        self._computations: dict[str, list[Instruction]] = {}
        self._tables: dict[str, dict[int, str]] = {}
        inside: list[Instruction] = []
        table: dict[int, str] = {}
        for line in text.splitlines():
            if re.fullmatch(r"[A-Z][A-Za-z]+", line):
                table = self._tables.setdefault(line, {})
            elif row := TABLE_ROW.match(line):
                table[int(row[1])] = row[2] or row[3] or ""
            elif header := HEADER.match(line):
                inside = self._computations.setdefault(header[1], [])
            elif found := parse_instruction(line):
                inside.append(found)
                self._instructions[found.name] = found
        self._users: dict[str, list[Instruction]] = {}
        for each in self._instructions.values():
            for name in each.operands:
                self._users.setdefault(name, []).append(each)
        self._kernels = {re.sub(r"[.\-]", "_", name): each for name, each in self._instructions.items()}

    def __getitem__(self, name: str) -> Instruction | None:
        """Return an instruction by its name, or by that of the kernel which XLA makes of it."""
        return self._instructions.get(name) or self._kernels.get(name)

    def inside(self, instruction: Instruction) -> list[Instruction]:
        """Return what a fusion holds, or the instruction itself; not what a loop holds."""
        if instruction.opcode != "fusion":
            return [instruction]
        return self._computations.get(instruction.called or "", [])

    def dtype(self, instruction: Instruction) -> str:
        """Return the dtype of the operands of its product: that of a dot inside, or of its first operand."""
        dot = next((each for each in self.inside(instruction) if each.opcode == "dot"), instruction)
        shapes = self._operand_shapes(dot)
        return shapes[0].dtype if shapes else ""

    def flops(self, instruction: Instruction) -> float:
        """Return the FLOPs of its products: 2 x M x N x K each; half of them where attention is causal."""
        if instruction.target.startswith(ATTENTION):
            return _attention_flops(instruction)
        return float(sum(self._dot_flops(each) for each in self.inside(instruction)))

    def bytes(self, instruction: Instruction) -> float:
        """Return the bytes that it reads and writes, each operand and result once.

        Of what is sliced only the slice counts, and of a buffer that is updated in place only the update.
        """
        inner = self.inside(instruction)
        if instruction.opcode == "fusion" and inner:
            return sum(self._read(inner), 0.0) + self._written(inner)
        read = sum(shape.bytes for shape in self._operand_shapes(instruction))
        written = sum(shape.bytes for shape in instruction.results)
        if instruction.opcode in SLICES:
            return 2.0 * written
        if instruction.opcode == "dynamic-update-slice":
            return 2.0 * self._update_bytes(instruction)
        if instruction.opcode == "custom-call":  # the last results of a library's call are its scratch memory
            written = sum(shape.bytes for shape in instruction.results if shape.dtype not in ("s8", "u8"))
        return float(read + written)

    def op_name(self, instruction: Instruction) -> str:
        """Return JAX's name of what it computes; where it has none, of something inside, or of a user."""
        return next(filter(None, (each.op_name for each in self._related(instruction))), "")

    def source(self, instruction: Instruction, package: str, helpers: tuple[str, ...] = ()) -> str:
        """Return file, line and function of a package that it comes from; "" where that is not known.

        Args:
          instruction: whose stack is read; where it has none, that of what it holds, or of a user.
          package: name of the folder that the files lie in.
          helpers: files whose callers are told instead, where there is one.
        """
        for each in self._related(instruction):
            frame = FRAME.search(each.rest)
            places = [
                f"{below}:{line} {function.split('.')[-1] if '<' in function else function}"
                for file, line, function in (self._stack(int(frame[1])) if frame else ())
                for _, here, below in (file.rpartition(f"/{package}/"),)
                if here
            ]
            if places:
                others = (each for each in places if not each.partition(":")[0].endswith(helpers))
                return next(others, places[0])
        return ""

    def _related(self, instruction: Instruction) -> Iterator[Instruction]:
        """Yield an instruction, what it holds, from its result on, and those that use its result."""
        nearest = [instruction]
        for _ in range(HOPS):
            for each in nearest:
                yield each
                yield from (held for held in reversed(self.inside(each)) if held is not each)
            nearest = [user for each in nearest for user in self._users.get(each.name, ())]

    def _stack(self, frame: int) -> Iterator[tuple[str, str, str]]:
        """Yield file, line and function of a frame, then of its callers."""
        frames, locations = self._tables.get("StackFrames", {}), self._tables.get("FileLocations", {})
        shift = int(_fields(frames.get(1, "")).get("parent_frame_id", "0"))  # the root has none; printed + 1
        seen: set[int] = set()
        while frame in frames and frame not in seen:
            seen.add(frame)
            entry = _fields(frames[frame])
            place = _fields(locations.get(int(entry.get("file_location_id", "0")), ""))
            file = self._tables.get("FileNames", {}).get(int(place.get("file_name_id", "0")), "")
            function = self._tables.get("FunctionNames", {}).get(int(place.get("function_name_id", "0")), "")
            yield file, place.get("line", ""), function
            frame = int(entry.get("parent_frame_id", "0")) - shift

    def _operand_shapes(self, instruction: Instruction) -> list[Shape]:
        found = (self._instructions.get(name) for name in instruction.operands)
        return [shape for each in found if each for shape in each.results]

    def _dot_flops(self, instruction: Instruction) -> int:
        is_gemm = "cublas" in instruction.target or "matmul" in instruction.target
        contracted, operands = CONTRACTED.search(instruction.rest), self._operand_shapes(instruction)
        if not (instruction.opcode == "dot" or is_gemm) or not contracted or not operands:
            return 0
        axes = [int(axis) for axis in re.findall(r"\d+", contracted[1] or contracted[2] or "")]
        return 2 * math.prod(instruction.results[0].dims) * math.prod(operands[0].dims[i] for i in axes)

    def _read(self, inner: list[Instruction]) -> Iterator[float]:
        """Yield the bytes of each parameter of a fusion that its result needs, from the result back."""
        by_name = {each.name: each for each in inner}
        needed = {inner[-1].name: 1.0}  # share of each array
        for each in reversed(inner):
            share = needed.get(each.name, 0.0)
            if each.opcode == "parameter":
                yield share * sum(shape.bytes for shape in each.results)
            for position, name in enumerate(each.operands):
                if name in by_name:
                    part = _operand_share(each, position, by_name[name]) if share else 0.0
                    needed[name] = max(needed.get(name, 0.0), min(share * part, 1.0))

    def _written(self, inner: list[Instruction]) -> int:
        root, by_name = inner[-1], {each.name: each for each in inner}
        results = [by_name[name] for name in root.operands if name in by_name]
        return sum(
            self._result_bytes(each, by_name) for each in (results if root.opcode == "tuple" else [root])
        )

    def _result_bytes(self, result: Instruction, by_name: Mapping[str, Instruction]) -> int:
        while result.opcode == "bitcast" and result.operands[0] in by_name:
            result = by_name[result.operands[0]]
        if result.opcode == "dynamic-update-slice":
            return self._update_bytes(result)
        return sum(shape.bytes for shape in result.results)

    def _update_bytes(self, instruction: Instruction) -> int:
        update = self._instructions.get(instruction.operands[1])
        return sum(shape.bytes for shape in update.results) if update else 0


def _operand_share(user: Instruction, position: int, operand: Instruction) -> float:
    """Return which share of an operand a whole result needs."""
    if user.opcode == "dynamic-update-slice" and position == 0:
        return 0.0  # updated in place
    if user.opcode not in SLICES or position > 0:
        return 1.0
    size = math.prod(operand.results[0].dims)
    return math.prod(user.results[0].dims) / size if size else 0.0


def _attention_flops(instruction: Instruction) -> float:
    """Count two products of (T, S, D) a head forward, five backward; half of each where it is causal."""
    found = SCORES.search(instruction.rest)
    if not found or not instruction.results:
        return 0.0
    B, H, T, S = (int(size) for size in re.findall(r"\d+", found[1]))
    D = math.prod(instruction.results[0].dims) / (B * H * T)
    products = 5 if "Backward" in instruction.target else 2
    return products * 2.0 * B * H * T * S * D * (0.5 if '"CAUSAL"' in instruction.rest else 1.0)


def _fields(text: str) -> dict[str, str]:
    """Read "line=3 column=4"."""
    return dict(part.split("=", 1) for part in text.split() if "=" in part)
