"""The thread in which a model's scheduler runs, and how requests of the event loop reach it."""

import asyncio
import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from jaxgpt.generation.scheduling.scheduler import NewToken, Scheduler, Text


class Update(NamedTuple):
    """What a step gave one text of a job.

    Attributes:
      place: of the text in its job.
      tokens: that are new.
      finished: nothing more comes of this text.
    """

    place: int
    tokens: list[NewToken]
    finished: bool


@dataclasses.dataclass(frozen=True)
class Caller:
    """Who asks for texts.

    Attributes:
      owner: callers take turns; the texts of one come in order.
      seconds: that each text may take; 0: any time.
      on_tokens: told of tokens of a text that arrive: the seconds since its last ones (since the request for
        the request's first), how many they are, and whether they are the request's first.
    """

    owner: Hashable
    seconds: float
    on_tokens: Callable[[float, int, bool], object]


class BusyError(Exception):
    """More texts wait already than may."""


class FailedError(Exception):
    """The scheduler's thread ended with an error."""


class Job:
    """The texts of one request; used on the event loop, filled from the worker's thread.

    Args:
      texts: what is asked for.
      caller: who asks.
    """

    def __init__(self, texts: Sequence[Text], caller: "Caller") -> None:
        self.texts = list(texts)
        self._caller = caller
        self._began = time.perf_counter()
        self._last: dict[int, float] = {}  # by place: when a text's last tokens came
        self.loop = asyncio.get_running_loop()
        self._updates: collections.deque[Update] = collections.deque()
        self._arrived = asyncio.Event()
        self._unfinished = len(self.texts)

    async def updates(self) -> list[Update] | None:
        """Wait for what is new; None when all texts are finished and everything was returned."""
        while not self._updates:
            if not self._unfinished:
                return None
            self._arrived.clear()
            await self._arrived.wait()
        found = list(self._updates)
        self._updates.clear()
        return found

    def deliver(self, updates: Sequence[Update]) -> None:
        """Take what a step gave; called on the event loop."""
        now = time.perf_counter()
        for place, tokens, _ in updates:
            made = sum(new.token >= 0 for new in tokens)  # the end by time is none
            if made:
                first = not self._last
                if first or place in self._last:
                    self._caller.on_tokens(now - self._last.get(place, self._began), made, first)
                self._last[place] = now
        self._updates.extend(updates)
        self._unfinished -= sum(update.finished for update in updates)
        self._arrived.set()


class Worker:
    """Runs a scheduler in a thread of its own.

    Args:
      scheduler: used by this thread alone.
      max_waiting: texts that may wait for a slot; more are refused.

    Attributes:
      max_texts: that may run and wait.
      failed: the thread ended with an error; nothing is answered any more.
    """

    def __init__(self, scheduler: Scheduler, max_waiting: int) -> None:
        self.max_texts = scheduler.max_running + max_waiting
        self._scheduler = scheduler
        self._changed = threading.Condition()
        self._inbox: list[Job] = []
        self._texts = 0  # submitted and not finished
        self._stopping = False
        self.failed = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether no text runs or waits."""
        with self._changed:
            return not self._texts

    @property
    def load(self) -> tuple[int, int]:
        """How many texts run, and how many wait."""
        with self._changed:
            running = self._scheduler.running
            return running, max(self._texts - running, 0)

    def submit(self, job: Job) -> None:
        """Begin a job; BusyError where there is no room for all its texts, FailedError after a failure."""
        with self._changed:
            if self.failed:
                raise FailedError
            if self._texts + len(job.texts) > self.max_texts or self._stopping:
                raise BusyError
            self._texts += len(job.texts)
            self._inbox.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """End a job's texts before the next step."""
        for text in job.texts:
            text.cancelled = True
        with self._changed:
            self._changed.notify()

    def stop(self) -> None:
        """End the thread after the step that runs."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        places: dict[Text, tuple[Job, int]] = {}
        try:
            self._work(places)
        except Exception as error:
            self._fail(places, error)
            raise

    def _work(self, places: dict[Text, tuple[Job, int]]) -> None:
        """Advance texts until the end; `places` holds those that are not ended, with job and place."""
        while (inbox := self._wait()) is not None:
            for job in inbox:
                for place, text in enumerate(job.texts):
                    places[text] = (job, place)
                    self._scheduler.submit(text)
            found: dict[Job, list[Update]] = {}
            for text in self._scheduler.step():
                new = text.take()
                if new or text.ended:  # `finished` would tell what clients cancel meanwhile
                    job, place = places[text]
                    found.setdefault(job, []).append(Update(place, new, text.ended))
                if text.ended:
                    del places[text]
            finished = sum(update.finished for updates in found.values() for update in updates)
            if finished:
                with self._changed:
                    self._texts -= finished
            self._deliver(found)

    def _fail(self, places: dict[Text, tuple[Job, int]], error: Exception) -> None:
        """End all texts with an error, and refuse those that come."""
        with self._changed:
            self.failed = True
            self._texts = 0
            inbox, self._inbox = self._inbox, []
        for job in inbox:
            places |= {text: (job, place) for place, text in enumerate(job.texts)}
        found: dict[Job, list[Update]] = {}
        for text, (job, place) in places.items():
            text.error = text.error or error
            found.setdefault(job, []).append(Update(place, [], True))
        self._deliver(found)

    def _wait(self) -> list[Job] | None:
        """Return the jobs that came, once there is something to do; None at the end.

        Until then memory is made ready for the texts that will come.
        """
        ready = True
        while True:
            with self._changed:
                if not ready:
                    self._changed.wait_for(self._has_work)
                if self._stopping:
                    return None
                if self._has_work():
                    inbox, self._inbox = self._inbox, []
                    return inbox
            ready = self._scheduler.pool.touch_next()

    def _has_work(self) -> bool:
        return bool(self._inbox or self._stopping or self._scheduler.busy)

    def _deliver(self, found: dict[Job, list[Update]]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, list[Update]]]] = {}
        for job, updates in found.items():
            by_loop.setdefault(job.loop, []).append((job, updates))
        for loop, parts in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver_all, parts)
            except RuntimeError:  # the loop is closed: nobody waits any more
                self._forget(parts)

    def _forget(self, parts: Sequence[tuple[Job, list[Update]]]) -> None:
        for job, _ in parts:
            for text in job.texts:
                text.cancelled = True


def _deliver_all(parts: Sequence[tuple[Job, list[Update]]]) -> None:
    for job, updates in parts:
        job.deliver(updates)
