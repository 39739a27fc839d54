"""What a training shows and records: the display, metrics.jsonl, TensorBoard."""

import contextlib
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxgpt.shared.console import say, stderr
from jaxgpt.shared.files import write_atomic
from jaxgpt.training.devices.processes import is_main_process
from jaxgpt.training.run.folder import metrics_line, read_metrics
from jaxgpt.training.run.full_disk import told_as_os_error


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Let a module that is not loaded yet seem not installed, while this is open."""
    absent = name not in sys.modules
    if absent:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if absent:
            del sys.modules[name]


RATE_STEPS = 50  # tokens/s is the mean over so many steps
PLAIN_LINES = 20  # lines of progress where stderr is no terminal
QUEUE_PAUSE_S = 0.01  # between two looks whether TensorBoard's thread takes more
SHOWN_INPUT_WAIT = 0.02  # share of the time from which on waiting for input is shown


def make_recorder(
    folder: Path, first_step: int, max_steps: int, tokens_per_step: int, peak_tokens_per_s: float | None
) -> "Recorder":
    """Return a recorder, in process 0 one that writes and shows."""
    kind = Recorder if is_main_process() else SilentRecorder
    return kind(folder, first_step, max_steps, tokens_per_step, peak_tokens_per_s)


class Recorder:
    """Writes each step down and keeps the display.

    Args:
      folder: the run folder.
      first_step: steps done already; records after it are removed, they will come again.
      max_steps: where the training ends.
      tokens_per_step: of the global batch.
      peak_tokens_per_s: of all devices at their peak rate, which MFU (model FLOPs utilization) is the share
        of; None where no peak is known.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        max_steps: int,
        tokens_per_step: int,
        peak_tokens_per_s: float | None,
    ) -> None:
        kept = [row for row in read_metrics(folder) if row["step"] <= first_step] if first_step else []
        self._path = folder / "metrics.jsonl"
        write_atomic(self._path, "".join(map(metrics_line, kept)))
        self._file = self._path.open("a", encoding="utf-8")
        self._board = _open_board(folder / "tensorboard", first_step)
        self._max_steps, self._tokens_per_step = max_steps, tokens_per_step
        self._peak_tokens_per_s = peak_tokens_per_s
        self._times: deque[float] = deque(maxlen=RATE_STEPS + 1)
        self._waits: deque[float] = deque(maxlen=RATE_STEPS)
        self._waited = 0.0
        self.tokens_per_s = 0.0  # mean over the last steps; compilation and validation are left out
        self._val = ""
        self._every = max(max_steps // PLAIN_LINES, 1)
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        self._display = Progress(*columns, console=stderr, disable=not stderr.is_terminal)
        self._task = self._display.add_task("compiling", total=max_steps, completed=first_step)
        self._display.start()

    def waited(self, seconds: float) -> None:
        """Count seconds since the last step was recorded in which the devices had no batch to work on."""
        self._waited += seconds

    def step(self, step: int, values: dict[str, float]) -> None:
        """Record a training step.

        Args:
          step: its number.
          values: at least loss (nats per token).
        """
        self._times.append(time.perf_counter())
        if len(self._times) > 1:
            self._waits.append(self._waited)
        self._waited = 0.0
        passed, steps = self._times[-1] - self._times[0], len(self._times) - 1
        rates: dict[str, float] = {}
        if passed > 0:
            self.tokens_per_s = steps * self._tokens_per_step / passed
            rates["step_ms"] = round(passed / steps * 1e3, 2)
            rates["input_wait"] = round(sum(self._waits) / passed, 4)
        rates["tokens_per_s"] = round(self.tokens_per_s, 1)
        utilization = ""
        if self._peak_tokens_per_s:
            rates["mfu"] = round(self.tokens_per_s / self._peak_tokens_per_s, 4)
            utilization = f" | MFU {rates['mfu']:.1%}"
        if rates.get("input_wait", 0.0) >= SHOWN_INPUT_WAIT:
            utilization += f" | {rates['input_wait']:.0%} waiting for input"
        self._write(step, {**values, **rates})
        text = f"loss {values['loss']:.4f}{self._val} | {self.tokens_per_s:,.0f} tokens/s{utilization}"
        self._display.update(self._task, completed=step, description=text)
        if not stderr.is_terminal and (step % self._every == 0 or step == self._max_steps):
            left = ""
            if self.tokens_per_s:
                seconds = (self._max_steps - step) * self._tokens_per_step / self.tokens_per_s
                left = f" | {seconds:.0f} s left"
            say(f"step {step}/{self._max_steps} | {text}{left}")

    def validation(self, step: int, values: dict[str, float]) -> None:
        """Record a validation; `values` holds at least val_loss (nats per token)."""
        self._write(step, values)
        self._val = f" | val {values['val_loss']:.4f}"
        say(
            f"step {step}: validation loss {values['val_loss']:.4f} nats/token, "
            f"{values['val_bits_per_byte']:.4f} bits/byte"
        )

    def pause(self) -> None:
        """Leave the time until the next step out of tokens/s."""
        self._times.clear()
        self._waits.clear()
        self._waited = 0.0

    def sample(self, step: int, text: str) -> None:
        """Record a sample text."""
        if self._has_board():
            self._board.add_text("sample", text, step)

    def _has_board(self) -> bool:
        """Whether TensorBoard's files can take a value now, and so without blocking."""
        if self._board is not None and not _takes_more(self._board):
            say("TensorBoard's files can't be written any more; metrics.jsonl holds the same figures")
            _close(self._board)
            self._board = None
        return self._board is not None

    def _write(self, step: int, values: dict[str, Any]) -> None:
        now = time.time()
        with told_as_os_error(self._path, f"the figures of step {step}"):
            self._file.write(metrics_line({"step": step, **values, "time": round(now, 3)}))
            self._file.flush()
        for name, value in values.items():
            if self._has_board():
                self._board.add_scalar(name, value, step, walltime=now)

    def close(self) -> None:
        """End the display and flush everything."""
        self._display.stop()
        with contextlib.suppress(OSError):  # a full disk, which step() has told
            self._file.close()
        if self._board is not None:
            _close(self._board)


def _open_board(folder: Path, first_step: int) -> Any:
    """Return the writer of TensorBoard's files; None, with a line, where its package is not installed."""
    try:
        with _hidden("torch"):  # which tensorboardX loads where it is, for seconds: nothing here needs it
            from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        if error.name != "tensorboardX":
            raise
        say("no TensorBoard files: tensorboardX is not installed (metrics.jsonl holds the same figures)")
        return None
    return SummaryWriter(str(folder), purge_step=first_step + 1)


def _takes_more(board: Any) -> bool:
    """Wait until the thread that writes TensorBoard's files takes more; False where an error has ended it."""
    writer = board.file_writer.event_writer
    while writer._worker.is_alive() and writer._event_queue.full():
        time.sleep(QUEUE_PAUSE_S)
    return bool(writer._worker.is_alive())


def _close(board: Any) -> None:
    """Close TensorBoard's files; on a full disk they stay as they are."""
    writer = board.file_writer.event_writer
    try:
        if _takes_more(board):
            board.close()
            return
        writer._event_queue.cancel_join_thread()  # what nobody reads any more
    except OSError:
        if _takes_more(board):
            writer._worker.stop()
    writer.close = lambda: None  # it would be tried again when the process ends


class SilentRecorder(Recorder):
    """The recorder of every process but the first: it does nothing."""

    def __init__(self, *_: Any) -> None:
        self.tokens_per_s = 0.0

    def waited(self, seconds: float) -> None:
        """Do nothing."""

    def step(self, step: int, values: dict[str, float]) -> None:
        """Do nothing."""

    def validation(self, step: int, values: dict[str, float]) -> None:
        """Do nothing."""

    def pause(self) -> None:
        """Do nothing."""

    def sample(self, step: int, text: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
