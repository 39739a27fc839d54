"""Continuous batching: texts that are generated side by side, whoever asks for them.

    scheduler = Scheduler(session)
    scheduler.submit(text)
    while scheduler.busy:
        for text in scheduler.step():
            tokens = text.take()

A step takes one token of every text that is being generated, and a part of the prompts of those that begin;
the weights are read once for all of them. Texts join and leave between two steps. A text that is alone
decodes several tokens a step. Each text is, to the bit, the one that it would be alone.
"""

import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxgpt.generation.drafting import Drafting
from jaxgpt.generation.sampling import damaged_model
from jaxgpt.generation.scheduling.logit_rules import LogitRules
from jaxgpt.generation.scheduling.pace import Pace
from jaxgpt.generation.scheduling.slots import SlotPool, shared_length
from jaxgpt.generation.scoring import TokenScore, score, tops_of_rows
from jaxgpt.generation.session import BatchSession, SlotView
from jaxgpt.generation.state import GenerationState
from jaxgpt.shared.errors import UserError

SCORED_ROWS = (
    64  # whose logits exist at once: those of a long prompt with GPT-2's vocabulary would take 200 MB
)
WORTH_WAITING = 64  # tokens that another text's prompt shares and will have computed soon


class NewToken(NamedTuple):
    """A generated token.

    Attributes:
      token: its id.
      text: what it completes, often nothing.
      score: its log-probability, and the most likely tokens in its place; None where nobody asked.
    """

    token: int
    text: str
    score: TokenScore | None


class Text:
    """A text in a scheduler.

    Args:
      state: what is to be generated; with no new tokens the prompt alone is taken.
      draft_tokens: tokens to draft at most by prompt lookup while it is alone; the text is the same.
      logprobs: the most likely tokens whose log-probabilities are wanted beside each token; None: no scores.
      score_prompt: whether the prompt's tokens are scored too.
      rules: what changes the logits before a token is drawn; scores are those of before.
      owner: texts of one owner take turns with those of others.
      deadline: time.monotonic() at which it ends as it is.

    Attributes:
      cached: tokens of the prompt that another text's keys and values gave.
      prompt_scores: of the prompt's tokens from the second one on; what a step scored is appended.
      error: why it failed; None if it did not.
      cancelled: set to True by anybody, it ends the text before the next step.
      ended: the scheduler, which alone sets it, has done with the text.
      slot: in which it runs.
      prompt_left: tokens of the prompt that are still to be taken.
      changes_logits: whether `changed` does anything.
      plain: its tokens are wanted and nothing beside them, as the model gives them.
    """

    def __init__(
        self,
        state: GenerationState,
        *,
        draft_tokens: int = 0,
        logprobs: int | None = None,
        score_prompt: bool = False,
        rules: LogitRules | None = None,
        owner: Hashable = None,
        deadline: float = float("inf"),
    ) -> None:
        self.state = state
        self.logprobs = logprobs
        self.score_prompt = score_prompt
        self.rules = rules or LogitRules()
        self.owner = owner
        self.deadline = deadline
        self.cached = 0
        self.prompt_scores: list[TokenScore] = []
        self.error: Exception | None = None
        self.cancelled = False
        self.ended = False
        self.slot = -1
        self.prompt_left = len(state.prompt)
        self.changes_logits = bool(self.rules) or state.changes_logits
        self.plain = logprobs is None and not self.changes_logits
        self._draft_tokens = draft_tokens
        self._drafting: Drafting | None = None
        self._new: list[NewToken] = []

    @property
    def finished(self) -> bool:
        """Whether nothing more comes: it is done, failed or was cancelled."""
        return self.cancelled or self.error is not None or self.state.finished()

    def take(self) -> list[NewToken]:
        """Return the tokens that are new since the last call."""
        new, self._new = self._new, []
        return new

    def changed(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the logits (V,) that the next token is drawn from, given the model's."""
        return self.rules.apply(self.state.penalized(logits), self.state.tokens)

    def push(self, token: int, score: TokenScore | None) -> None:
        """Take the next token."""
        self._new.append(NewToken(token, self.state.push(token), score))

    def advance_alone(self, session: BatchSession) -> None:
        """Decode by several tokens where nothing else runs; all but the last are taken by the session."""
        if self._drafting is None:
            self._drafting = Drafting(self.state, self._draft_tokens)
        new = self._drafting.advance(SlotView(session, self.slot))
        self._new += [NewToken(token, text, None) for token, text in new]

    def end_by_time(self) -> None:
        """Finish it as it is, because its time is over."""
        self._new.append(NewToken(-1, self.state.end("time"), None))


@dataclasses.dataclass
class Counts:
    """What a scheduler has done so far.

    Attributes:
      steps: calls of the session.
      prompt_tokens: that were computed.
      cached_tokens: of prompts, that a past text gave.
      new_tokens: generated.
    """

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0


class _Rows(NamedTuple):
    """What a step takes of a text."""

    text: Text
    tokens: Sequence[int]
    wanted: Sequence[bool]  # logits after which tokens


class Scheduler:
    """Generates texts in the slots of a session; for one thread.

    Args:
      session: the model.
      max_running: texts side by side; 0: as many as there are slots. The other slots keep past texts.
      keep_bytes: see SlotPool.

    Attributes:
      counts: what was done.
      pool: of slots.
      waiting: how many texts have no slot yet.
    """

    def __init__(self, session: BatchSession, max_running: int = 0, keep_bytes: int | None = None) -> None:
        self.session = session
        self.max_running = max_running or session.slots
        self.pool = SlotPool(session, keep_bytes)
        self.counts = Counts()
        self.waiting = 0
        self._queues: collections.OrderedDict[Hashable, collections.deque[Text]] = collections.OrderedDict()
        self._running: list[Text] = []  # in the order in which they began
        self._pace = Pace()

    @property
    def running(self) -> int:
        """How many texts have a slot."""
        return len(self._running)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._running or self._queues)

    def submit(self, text: Text) -> None:
        """Let a text wait for its turn: owners take turns, the texts of each come in order."""
        self._queues.setdefault(text.owner, collections.deque()).append(text)
        self.waiting += 1

    def step(self) -> list[Text]:
        """Advance all texts that run, after others have joined them.

        Returns:
          Those for which something happened: tokens, scores, the end.
        """
        ended = self._leave_out_ended()
        self._admit()
        texts = list(self._running)
        if texts:
            try:
                self._advance(texts)
            except Exception as error:  # what slots hold is not known any more
                for text in texts:
                    text.error = text.error or error
            for text in texts:
                if text.finished:
                    self._end(text)
        return ended + texts

    def _advance(self, texts: list[Text]) -> None:
        decoding = [text for text in texts if not text.prompt_left]
        started = time.perf_counter()
        if len(texts) == 1 and decoding and texts[0].plain:
            (text,) = texts
            before = len(text.state.tokens)
            text.advance_alone(self.session)
            made = len(text.state.tokens) - before
            self.pool.tokens[text.slot] += text.state.tokens[before - 1 : -1]
            self.counts.new_tokens += made
            self._pace.update(1, 0, (time.perf_counter() - started) / made)
        else:
            rows = [_Rows(text, text.state.tokens[-1:], (True,)) for text in decoding]
            rows += self._prompt_rows(texts, self._pace.rows(len(decoding)))
            self._take(rows)
            prompt_rows = sum(len(row.tokens) for row in rows[len(decoding) :])
            self._pace.update(len(decoding), prompt_rows, time.perf_counter() - started)
        self.counts.steps += 1

    def _prompt_rows(self, texts: Sequence[Text], room: int) -> list[_Rows]:
        """Return the parts of prompts that the next step takes, those that began first before others."""
        found = []
        scored = SCORED_ROWS
        for text in texts:
            count = min(text.prompt_left, room, scored if text.score_prompt else room)
            if not count:
                continue
            first = len(text.state.prompt) - text.prompt_left
            last = count == text.prompt_left
            if text.score_prompt:
                wanted = [True] * count
                scored -= count
            else:
                wanted = [False] * (count - 1) + [last and text.state.left > 0]
            found.append(_Rows(text, text.state.prompt[first : first + count], wanted))
            room -= count
        return found

    def _take(self, rows: Sequence[_Rows]) -> None:
        """Let the session take tokens, and each text what follows from them."""
        tokens = list(itertools.chain.from_iterable(row.tokens for row in rows))
        slots = [row.text.slot for row in rows for _ in row.tokens]
        wanted = np.fromiter(itertools.chain.from_iterable(row.wanted for row in rows), bool, len(tokens))
        simple = all(row.text.plain and row.text.state.sampler.greedy for row in rows)
        best: npt.NDArray[np.int32] | None = None
        logits: npt.NDArray[np.float32] | None = None
        if simple and not any(row.text.score_prompt for row in rows):
            with contextlib.suppress(UserError):  # not finite: below each text's own logits say so
                best = self.session.greedy(tokens, slots, wanted=wanted)
        if best is None:
            logits = self.session.forward(tokens, slots, wanted=wanted)
        draws: list[tuple[int, Text]] = []  # rows of logits, and for whom
        scored: list[tuple[int, Text, int]] = []  # the same, and the token of the prompt that follows
        place = 0
        for text, taken, asked in rows:
            self.pool.tokens[text.slot] += taken
            next_place = place + sum(asked)
            if text.prompt_left:
                after = len(text.state.prompt) - text.prompt_left + 1
                text.prompt_left -= len(taken)
                self.counts.prompt_tokens += len(taken)
                if text.score_prompt:
                    targets = text.state.prompt[after : after + len(taken)]
                    scored += [(place + i, text, target) for i, target in enumerate(targets)]
            if not text.prompt_left and not text.state.left:
                text.state.end("length")
            elif not text.prompt_left and asked[-1]:
                draws.append((next_place - 1, text))
            place = next_place
        if best is not None:
            for at, text in draws:
                text.push(int(best[at]), None)
        elif logits is not None:
            self._score(logits, scored)
            self._draw(logits, draws)
        self.counts.new_tokens += len(draws)

    def _score(self, logits: npt.NDArray[np.float32], scored: Sequence[tuple[int, Text, int]]) -> None:
        """Score tokens of prompts."""
        most = max((text.logprobs or 0 for _, text, _ in scored), default=0)
        tops = tops_of_rows(self.session, logits[[at for at, _, _ in scored]], most)
        for (at, text, target), top in zip(scored, tops, strict=True):
            with _own_error(text):
                text.prompt_scores.append(score(logits[at], top, target, text.logprobs or 0))

    def _draw(self, logits: npt.NDArray[np.float32], draws: Sequence[tuple[int, Text]]) -> None:
        """Draw each text's next token, and score it where that is asked for."""
        asked = [(at, text) for at, text in draws if text.logprobs is not None]
        most = max((text.logprobs or 0 for _, text in asked), default=0)
        own_tops = tops_of_rows(self.session, logits[[at for at, _ in asked]], most)
        top_of = {text: top for (_, text), top in zip(asked, own_tops, strict=True)}
        raw = {text: logits[at].copy() for at, text in asked if text.changes_logits}
        for at, text in draws:
            if text.changes_logits:
                logits[at] = text.changed(logits[at])
        rows = logits if len(draws) == len(logits) else logits[[at for at, _ in draws]]
        samplers = [text.state.sampler for _, text in draws]
        samplings, uniforms = [s.sampling for s in samplers], [s.next_uniform() for s in samplers]
        tokens = self.session.draw(rows, samplings, uniforms) if draws else []
        for (_, text), row, token in zip(draws, rows, tokens, strict=True):
            with _own_error(text):
                if token is None:
                    raise damaged_model()
                told = None
                if text.logprobs is not None:
                    told = score(raw.get(text, row), top_of[text], token, text.logprobs)
                text.push(token, told)

    def _admit(self) -> None:
        """Give slots to waiting texts."""
        while self.pool.free and len(self._running) < self.max_running and (text := self._next()):
            queue = self._queues[text.owner]
            queue.popleft()
            self._queues.move_to_end(text.owner)
            if not queue:
                del self._queues[text.owner]
            self.waiting -= 1
            asked = text.state.prompt, text.state.left
            text.slot, text.cached = self.pool.take(*asked, reuse=not text.score_prompt)
            text.prompt_left = len(text.state.prompt) - text.cached
            text.state.begin()
            self.counts.cached_tokens += text.cached
            self._running.append(text)

    def _next(self) -> Text | None:
        """Return the text whose turn it is; one whose prompt is nearly computed by another one waits."""
        first = (queue[0] for queue in self._queues.values())
        return next((t for t in first if t.score_prompt or not self._comes_soon(t.state.prompt)), None)

    def _comes_soon(self, prompt: Sequence[int]) -> bool:
        """Whether a text that runs is computing much of a prompt that no slot has yet."""
        _, have = self.pool.longest_shared(prompt)
        coming = (shared_length(prompt[:-1], text.state.prompt) for text in self._running if text.prompt_left)
        return self.pool.keeps and max(coming, default=0) >= have + WORTH_WAITING

    def _leave_out_ended(self) -> list[Text]:
        """Take out texts that were cancelled, or whose time is over."""
        now = time.monotonic()
        gone = []
        for text in (*self._running, *itertools.chain.from_iterable(self._queues.values())):
            if not text.cancelled and now < text.deadline:
                continue
            if not text.cancelled:
                text.end_by_time()
            gone.append(text)
        for text in gone:
            if text in self._running:
                self._end(text)
            else:
                self._queues[text.owner].remove(text)
                text.ended = True
                self.waiting -= 1
                if not self._queues[text.owner]:
                    del self._queues[text.owner]
        return gone

    def _end(self, text: Text) -> None:
        self._running.remove(text)
        text.ended = True
        if text.error is not None:
            self.pool.drop(text.slot)
        else:
            self.pool.give_back(text.slot)


@contextlib.contextmanager
def _own_error(text: Text) -> Iterator[None]:
    """Let an error that concerns one text end no other."""
    try:
        yield
    except UserError as error:
        text.error = error
