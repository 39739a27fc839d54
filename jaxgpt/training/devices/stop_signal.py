"""Ctrl-C and SIGTERM while a training runs: it saves and leaves; after a second Ctrl-C it just leaves."""

import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

from jaxgpt.shared.console import say
from jaxgpt.shared.entry import leave
from jaxgpt.training.devices.processes import all_agree

_END = 0  # no signal has this number


class StopSignal:
    """Notices Ctrl-C and SIGTERM, so that the training can save and leave; a second Ctrl-C ends it at once.

    With several processes JAX's preemption service notices SIGTERM, spreads it and makes all stop at the same
    step; Ctrl-C in one of them is handed on to it as SIGTERM. In a thread that is not the main one nothing is
    noticed.

    A thread waits for the signals: the main one may be compiling for a minute, and runs no Python then.
    """

    def __init__(self) -> None:
        self._asked = False
        self._interrupts = 0
        self._alone = jax.process_count() == 1
        self._before: dict[int, Any] = {}
        self._thread: threading.Thread | None = None
        if threading.current_thread() is not threading.main_thread():
            return
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._before_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM) if self._alone else (signal.SIGINT,):
            if signal.getsignal(number) is signal.SIG_IGN:  # as nohup and shells have it in the background
                continue
            self._before[number] = signal.signal(number, lambda *_: None)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while (number := os.read(self._read_end, 1)[0]) != _END:
            if number in self._before:
                self._note(number)

    def _note(self, number: int) -> None:
        self._asked = True
        if number != signal.SIGINT:
            return
        self._interrupts += 1
        if self._interrupts > 1:
            leave(
                "interrupted again: nothing more was saved; the same command goes on from the last checkpoint"
            )
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)
        say("interrupted: saving after this step (Ctrl-C again leaves at once, without saving)")

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; every process must ask at every step."""
        return self._asked if self._alone else bool(multihost_utils.reached_preemption_sync_point(step))

    def interrupted(self) -> bool:
        """Whether Ctrl-C was pressed in one of the processes; every process must ask."""
        return not all_agree(not self._interrupts)

    def __enter__(self) -> "StopSignal":
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        if self._thread is None:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        signal.set_wakeup_fd(self._before_fd)
        os.write(self._write_end, bytes([_END]))
        self._thread.join()
        self._thread = None
        os.close(self._read_end)
        os.close(self._write_end)
