"""The server's process: it listens while models load, and ends when no text runs any more."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import uvicorn

from jaxgpt_export.serve.app import State, build_app, drain, refuse_more
from jaxgpt_export.serve.guard import Rules
from jaxgpt_export.serve.metrics import Metrics
from jaxgpt_export.serve.served_model import Limits, ServedModel

LOOK_SECONDS = 0.01  # between two looks at whether models are loaded
GRACE_SECONDS = 2  # for answers that a client does not read, once all texts are done


@runtime_checkable
class Loading(Protocol):
    """Models that are being loaded."""

    @property
    def done(self) -> bool:
        """Whether they are loaded, or can't be."""
        ...

    def result(self) -> list[ServedModel]:
        """Wait for them; raise what went wrong."""
        ...


class _Uvicorn(uvicorn.Server):
    """Leaves signals to the one who runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """Answers requests until a signal ends it.

    Args:
      loading: the models.
      rules: who is answered.
      limits: what is allowed.
      announce: called once the models are ready.
    """

    def __init__(
        self,
        loading: Loading,
        rules: Rules,
        limits: Limits,
        announce: Callable[[Sequence[ServedModel]], object],
    ) -> None:
        self._loading = loading
        self._announce = announce
        self._state = State({}, limits.seconds, Metrics())
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                build_app(self._state, rules),
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
        )
        self._signals: list[int] = []

    def run(self, listener: socket.socket) -> bool:
        """Answer requests.

        Args:
          listener: a socket that listens.

        Returns:
          Whether Ctrl-C ended it.

        Raises:
          UserError: a model can't be loaded.
        """
        asyncio.run(self._run(listener))
        return signal.SIGINT in self._signals

    async def _run(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        serving = asyncio.create_task(self._uvicorn.serve(sockets=[listener]))
        models: list[ServedModel] = []
        try:
            while not self._loading.done and not serving.done():
                await asyncio.sleep(LOOK_SECONDS)
            if self._loading.done:
                models = self._loading.result()
                self._state.metrics.observe(models)
                self._state.models.update({model.name: model for model in models})
                self._announce(models)
                await serving
        finally:
            self._uvicorn.should_exit = True
            await serving
            for model in models:
                model.worker.stop()

    def _on_signal(self, number: int) -> None:
        """Begin to end; a second signal ends at once."""
        again = bool(self._signals)
        self._signals.append(number)
        if again or not self._state.models:
            refuse_more(self._state)
            self._uvicorn.should_exit = self._uvicorn.force_exit = True
        else:
            self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        await drain(self._state)
        self._uvicorn.should_exit = True
