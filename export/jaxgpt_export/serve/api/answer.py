"""Carrying out a request: texts go to the model's worker, and what comes back goes to the client.

A client that leaves ends the work: one task waits for http.disconnect and cancels the texts, which the
scheduler reads before each step. This works for answers in one piece as for streams.
"""

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, Protocol, runtime_checkable

from jaxgpt.generation.scheduling.scheduler import Text
from jaxgpt.shared.errors import UserError

from jaxgpt_export.serve.api.api_error import ApiError
from jaxgpt_export.serve.served_model import ServedModel
from jaxgpt_export.serve.worker import BusyError, FailedError, Job, Update

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

COME_AGAIN = {"Retry-After": "1"}  # seconds


@runtime_checkable
class Reply(Protocol):
    """How a route's answer looks."""

    def whole(self, job: Job, updates: list[Update]) -> dict[str, Any]:
        """Return the answer in one piece, from all updates."""
        ...

    def begin(self) -> list[dict[str, Any]]:
        """Return the events with which a stream begins."""
        ...

    def events(self, job: Job, update: Update) -> list[dict[str, Any]]:
        """Return the events of a stream that follow from an update."""
        ...

    def end(self, job: Job) -> list[dict[str, Any]]:
        """Return the events with which a stream ends."""
        ...


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a request asks for, read and checked, and not begun.

    Attributes:
      texts: for the scheduler.
      reply: how they are shown.
      stream: as server-sent events.
    """

    texts: list[Text]
    reply: Reply
    stream: bool


class Answer:
    """An ASGI application that answers one request.

    Args:
      model: that answers.
      job: the texts.
      reply: how they are shown.
      stream: as server-sent events.
    """

    def __init__(self, model: ServedModel, job: Job, reply: Reply, stream: bool) -> None:
        self._model, self._job, self._reply, self._stream = model, job, reply, stream
        try:
            model.worker.submit(job)
        except FailedError:
            raise ApiError(503, "the model failed; restart the server, whose log says how") from None
        except BusyError:
            require_few(model, len(job.texts))
            message = "the queue is full; try again in a moment"
            raise ApiError(429, message, code="queue_full", headers=dict(COME_AGAIN)) from None

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Send the answer, unless the client leaves."""
        work = asyncio.create_task(self._send_stream(send) if self._stream else self._send_whole(send))
        gone = asyncio.create_task(_wait_for_disconnect(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:  # also where this task itself is cancelled
            finished = work.done()
            self._model.worker.cancel(self._job)  # after an error texts run still; ended ones take no notice
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if finished and (error := work.exception()) is not None and not isinstance(error, OSError):
            raise error

    async def _send_whole(self, send: Send) -> None:
        updates: list[Update] = []
        while (new := await self._job.updates()) is not None:
            updates += new
        try:
            _raise_error(self._job)
            status, value = 200, self._reply.whole(self._job, updates)
        except ApiError as error:
            status, value = error.status, error.body()
        body = json.dumps(value, allow_nan=False).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _send_stream(self, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # nginx would hold the text back
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for events in self._events():
            await send({"type": "http.response.body", "body": events, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _events(self) -> AsyncIterator[bytes]:
        if begin := self._reply.begin():
            yield _sse(begin)
        while (new := await self._job.updates()) is not None:
            try:
                _raise_error(self._job)
                events = [event for update in new for event in self._reply.events(self._job, update)]
            except ApiError as error:
                self._model.worker.cancel(self._job)
                yield _sse([error.body()])
                return
            if events:
                yield _sse(events)  # the tokens of one call of the engine, in one write
        yield _sse(self._reply.end(self._job)) + b"data: [DONE]\n\n"


def require_few(model: ServedModel, count: int) -> None:
    """Raise ApiError where a request asks for more texts than may ever run and wait."""
    most = model.worker.max_texts
    if count > most:
        raise ApiError(400, f"{count} texts are asked for, at most {most} at once", code="too_many_texts")


def _sse(events: list[dict[str, Any]]) -> bytes:
    return "".join(f"data: {json.dumps(event, allow_nan=False)}\n\n" for event in events).encode()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _raise_error(job: Job) -> None:
    """Raise ApiError where a text failed, or was to be generated and had no time for its first token."""
    for text in job.texts:
        if isinstance(text.error, UserError):
            raise ApiError(500, str(text.error), code="model_error")
        if text.error is not None:
            raise ApiError(500, f"the model failed: {type(text.error).__name__}", code="model_error")
        state = text.state
        if state.finish_reason == "time" and not state.tokens and state.left:
            taken, whole = len(state.prompt) - text.prompt_left, len(state.prompt)
            raise ApiError(
                503,
                f"the time was over before a token was generated, {taken} of the prompt's {whole} tokens "
                "were taken; ask for fewer texts at once, or raise --max-seconds",
                code="time_over",
            )
