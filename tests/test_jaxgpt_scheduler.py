"""The scheduler: every text is the one that it would be alone, whoever joins, leaves or was there before."""

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from jaxgpt.generation.sampling import Sampling, Top, damaged_model, draws_in_numpy, tops_in_numpy
from jaxgpt.generation.scheduling.logit_rules import LogitRules
from jaxgpt.generation.scheduling.pace import Pace
from jaxgpt.generation.scheduling.scheduler import Scheduler, Text
from jaxgpt.generation.scheduling.slots import SlotPool
from jaxgpt.generation.session import BatchSession
from jaxgpt.generation.state import GenerationState
from jaxgpt.shared.errors import UserError
from jaxgpt.shared.tokenizer import Tokenizer, load_tokenizer

CONTEXT = 96
LAST_BITS = 1e-12  # a sum of exponentials in another order, in float64


class HistorySession:
    """A session whose logits depend on everything that a slot holds, and on nothing else."""

    def __init__(self, vocab_size: int, slots: int, block_size: int = CONTEXT) -> None:
        self.block_size, self.slots = block_size, slots
        self.cache_bytes_per_token = 10
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self.given_back: list[int] = []
        self.touched: dict[int, int] = {}
        self.damaged_at: int | None = None  # a token after which logits are NaN
        self._vocab_size = vocab_size

    def logits(self, slot: int) -> np.ndarray:
        digest = hashlib.sha256(np.array(self.held[slot], np.int32).tobytes()).digest()
        random = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        row = random.standard_normal(self._vocab_size).astype(np.float32) * 4
        if self.damaged_at is not None and self.damaged_at in self.held[slot]:
            row[0] = np.nan
        return row

    def forward(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        all_logits: bool = False,
        *,
        wanted: np.ndarray | None = None,
    ) -> np.ndarray:
        assert len(tokens) == len(slots) > 0
        changes = sum(a != b for a, b in itertools.pairwise(slots)) + 1
        assert changes == len(set(slots)), "rows of a slot are neighbours"
        found = []
        for i, (token, slot) in enumerate(zip(tokens, slots, strict=True)):
            self.held[slot].append(token)
            assert len(self.held[slot]) <= self.block_size
            last = i + 1 == len(slots) or slots[i + 1] != slot
            if all_logits or (last if wanted is None else wanted[i]):
                found.append(self.logits(slot))
        return np.array(found, np.float32).reshape(len(found), self._vocab_size)

    def greedy(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        all_logits: bool = False,
        *,
        wanted: np.ndarray | None = None,
    ) -> np.ndarray:
        before = [list(held) for held in self.held]
        logits = self.forward(tokens, slots, all_logits, wanted=wanted)
        if not np.isfinite(logits).all():
            self.held = before
            raise damaged_model()
        return logits.argmax(axis=1).astype(np.int32)

    def decode_greedy(
        self, token: int, max_tokens: int = 1, stop_token: int = -1, slot: int = 0
    ) -> list[int]:
        made: list[int] = []
        while len(made) < max_tokens and (not made or token != stop_token):
            token = int(self.greedy([token], [slot])[0])
            made.append(token)
        return made

    def draw(
        self, logits: np.ndarray, samplings: Sequence[Sampling], uniforms: Sequence[float]
    ) -> list[int | None]:
        return draws_in_numpy(logits, samplings, uniforms)

    def top(self, logits: np.ndarray, temperatures: Sequence[float], count: int) -> list[Top | None]:
        return tops_in_numpy(logits, temperatures, count)

    def truncate(self, length: int, slot: int) -> None:
        assert length <= len(self.held[slot])
        del self.held[slot][length:]

    def copy(self, source: int, target: int, length: int) -> None:
        assert source != target
        assert length <= len(self.held[source])
        self.held[target] = self.held[source][:length]

    def release(self, slot: int) -> None:
        self.held[slot] = []
        self.given_back.append(slot)

    def touch(self, slot: int, tokens: int) -> None:
        assert not self.held[slot]
        assert tokens <= self.block_size
        self.touched[slot] = tokens


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> Tokenizer:
    return load_tokenizer(data)


@dataclasses.dataclass(frozen=True)
class Wish:
    """What is asked for of a text."""

    prompt: tuple[int, ...]
    sampling: Sampling
    new_tokens: int = 12
    draft_tokens: int = 0
    logprobs: int | None = None
    score_prompt: bool = False
    rules: LogitRules = dataclasses.field(default_factory=LogitRules)

    def text(self, tokenizer: Tokenizer, owner: int = 0, block_size: int = CONTEXT) -> Text:
        state = GenerationState(
            tokenizer, self.prompt, block_size, self.new_tokens, self.sampling, stop=("zzz",)
        )
        return Text(
            state,
            draft_tokens=self.draft_tokens,
            logprobs=self.logprobs,
            score_prompt=self.score_prompt,
            rules=self.rules,
            owner=owner,
        )


def run_alone(tokenizer: Tokenizer, wish: Wish) -> Text:
    scheduler = Scheduler(HistorySession(tokenizer.vocab_size, 1))
    text = wish.text(tokenizer)
    scheduler.submit(text)
    while scheduler.busy:
        scheduler.step()
    return text


def random_wish(random: np.random.Generator, vocab_size: int, beginnings: list[tuple[int, ...]]) -> Wish:
    beginning = beginnings[random.integers(len(beginnings))]
    end = random.integers(vocab_size, size=random.integers(1, 6)).tolist()
    prompt = (*beginning, *end)[: CONTEXT - 1]
    sampling = Sampling(float(random.choice([0.0, 0.0, 0.7])), top_p=0.9, seed=int(random.integers(100)))
    wants_scores = random.random() < 0.3
    return Wish(
        prompt,
        sampling,
        new_tokens=int(random.integers(1, 20)),
        draft_tokens=int(random.choice([0, 4])),
        logprobs=2 if wants_scores else None,
        score_prompt=wants_scores and bool(random.random() < 0.5),
        rules=LogitRules({3: 2.0}, 0.5, 0.25) if random.random() < 0.2 else LogitRules(),
    )


@pytest.mark.parametrize("keep_bytes", [None, 0, 1500])
def test_every_text_is_the_one_that_it_would_be_alone(tokenizer: Tokenizer, keep_bytes: int | None) -> None:
    random = np.random.default_rng(0)
    session = HistorySession(tokenizer.vocab_size, 6)
    assert isinstance(session, BatchSession)
    scheduler = Scheduler(session, max_running=4, keep_bytes=keep_bytes)
    beginnings = [tuple(random.integers(tokenizer.vocab_size, size=n).tolist()) for n in (0, 20, 40, 70)]
    pieces: dict[Text, list[int]] = {}
    wishes: dict[Text, Wish] = {}
    left: set[Text] = set()
    for _ in range(1000):
        if len(wishes) < 120 and random.random() < 0.5:
            wish = random_wish(random, tokenizer.vocab_size, beginnings)
            text = wish.text(tokenizer, owner=int(random.integers(3)))
            wishes[text] = wish
            pieces[text] = []
            scheduler.submit(text)
        if random.random() < 0.05 and wishes:
            leaver = list(wishes)[random.integers(len(wishes))]
            if not leaver.finished:
                leaver.cancelled = True
                left.add(leaver)
        for text in scheduler.step():
            pieces[text] += [new.token for new in text.take()]
        for slot, tokens in enumerate(scheduler.pool.tokens):
            assert session.held[slot][: len(tokens)] == tokens
    assert len(wishes) == 120
    assert not scheduler.busy
    assert scheduler.pool.free == session.slots
    assert 0 < len(left) < 60
    for text, wish in wishes.items():
        alone = run_alone(tokenizer, wish)
        if text in left:
            assert pieces[text] == alone.state.tokens[: len(pieces[text])]
            continue
        assert pieces[text] == text.state.tokens == alone.state.tokens
        assert text.state.result().text == alone.state.result().text
        assert text.prompt_scores == alone.prompt_scores
        assert len(text.prompt_scores) == (len(wish.prompt) - 1 if wish.score_prompt else 0)
    if keep_bytes:
        assert scheduler.counts.cached_tokens > 500
        assert scheduler.pool.kept_bytes <= keep_bytes
    if keep_bytes is None:
        assert scheduler.counts.cached_tokens == 0
    assert bool(session.given_back) == (keep_bytes is not None)


def test_a_prompt_that_several_share_is_computed_once(tokenizer: Tokenizer) -> None:
    prompt = tuple(range(80))
    session = HistorySession(tokenizer.vocab_size, 6)
    scheduler = Scheduler(session, max_running=4, keep_bytes=10**6)
    texts = [Wish((*prompt, i), Sampling(seed=i)).text(tokenizer) for i in range(4)]
    for text in texts:
        scheduler.submit(text)
    while scheduler.busy:
        scheduler.step()
    assert [text.cached for text in texts] == [0, 80, 80, 80]
    assert scheduler.counts.prompt_tokens == 81 + 3


def test_owners_take_turns(tokenizer: Tokenizer) -> None:
    scheduler = Scheduler(HistorySession(tokenizer.vocab_size, 1))
    order: list[int] = []
    for owner in (1, 1, 1, 2, 3):
        scheduler.submit(Wish((owner,), Sampling(), new_tokens=1).text(tokenizer, owner))
    while scheduler.busy:
        order += [int(str(text.owner)) for text in scheduler.step() if text.finished]
    assert order == [1, 2, 3, 1, 1]


def test_a_long_prompt_leaves_running_texts_their_steps(tokenizer: Tokenizer) -> None:
    session = HistorySession(tokenizer.vocab_size, 2)
    scheduler = Scheduler(session)
    running = Wish((1, 2), Sampling(0.0), new_tokens=90).text(tokenizer)
    scheduler.submit(running)
    scheduler.step()
    late = Wish(tuple(range(90)), Sampling(0.0), new_tokens=2).text(tokenizer, owner=1)
    scheduler.submit(late)
    while not late.finished and not running.finished:
        before = len(running.state.tokens)
        scheduler.step()
        assert len(running.state.tokens) > before
    assert late.finished


def test_a_text_whose_time_is_over_ends_as_it_is(tokenizer: Tokenizer) -> None:
    scheduler = Scheduler(HistorySession(tokenizer.vocab_size, 1))
    text = Wish((1,), Sampling()).text(tokenizer)
    scheduler.submit(text)
    scheduler.step()
    scheduler.step()
    text.deadline = 0.0
    scheduler.step()
    assert text.finished
    assert text.state.result().finish_reason == "time"
    assert len(text.state.tokens) >= 2
    assert not scheduler.busy


def test_memory_is_made_ready_up_to_the_limit_and_taken_first(tokenizer: Tokenizer) -> None:
    session = HistorySession(tokenizer.vocab_size, 6, block_size=200)
    pool = SlotPool(session, keep_bytes=5000)  # 500 positions
    while pool.touch_next():
        assert pool.kept_bytes <= 5000
    assert session.touched == {0: 200, 1: 200, 2: 64}  # 64 positions at a time, one slot after the other
    slots = [pool.take([1] * 150)[0] for _ in range(3)]
    assert sorted(slots[:2]) == [0, 1]
    assert not session.given_back
    for slot in (slots[0], slots[2], slots[1]):
        pool.tokens[slot] = [1] * 150
        pool.give_back(slot)  # 200 + 150 + 200 positions: one slot too many
    assert session.given_back == [slots[0]]
    assert pool.kept_bytes == 3500
    assert pool.take([2] * 190) == (slots[1], 0)  # used after slots[2], but it has the memory
    assert SlotPool(session, keep_bytes=0).touch_next() is False
    assert SlotPool(session).touch_next() is False


@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_an_error_ends_the_text_that_has_it_and_no_other(tokenizer: Tokenizer, temperature: float) -> None:
    session = HistorySession(tokenizer.vocab_size, 2)
    session.damaged_at = 77
    scheduler = Scheduler(session, keep_bytes=10**6)
    bad = Wish((5, 77), Sampling(temperature)).text(tokenizer)
    good = Wish((5, 76), Sampling(temperature)).text(tokenizer)
    for text in (bad, good):
        scheduler.submit(text)
    while scheduler.busy:
        scheduler.step()
    assert isinstance(bad.error, UserError)
    assert good.error is None
    assert good.state.tokens == run_alone(tokenizer, Wish((5, 76), Sampling(temperature))).state.tokens


def test_a_failing_session_ends_all_that_run_and_serves_the_next(tokenizer: Tokenizer) -> None:
    session = HistorySession(tokenizer.vocab_size, 2)
    scheduler = Scheduler(session, keep_bytes=10**6)
    texts = [Wish((i, 7), Sampling(0.7)).text(tokenizer) for i in range(3)]
    for text in texts:
        scheduler.submit(text)
    scheduler.step()
    forward = session.forward
    session.forward = lambda *_, **__: (_ for _ in ()).throw(MemoryError("no more"))  # type: ignore[method-assign]
    scheduler.step()
    session.forward = forward  # type: ignore[method-assign]
    while scheduler.busy:
        scheduler.step()
    assert [type(text.error) for text in texts] == [MemoryError, MemoryError, type(None)]
    assert texts[2].state.tokens == run_alone(tokenizer, Wish((2, 7), Sampling(0.7))).state.tokens


def test_a_prompt_alone_is_scored_and_nothing_generated(tokenizer: Tokenizer) -> None:
    scheduler = Scheduler(HistorySession(tokenizer.vocab_size, 1))
    prompt = tuple(range(CONTEXT))  # a full context
    state = GenerationState(tokenizer, prompt, CONTEXT, 0, Sampling(0.0), least_tokens=0)
    text = Text(state, logprobs=1, score_prompt=True)
    scheduler.submit(text)
    while scheduler.busy:
        scheduler.step()
    assert text.finished
    assert text.state.tokens == []
    assert len(text.prompt_scores) == CONTEXT - 1


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.5])
@pytest.mark.parametrize(
    "rules", [LogitRules(), LogitRules({3: 8.0, 5: -4.0}, 0.5, 0.25)], ids=["plain", "rules"]
)
def test_a_generated_token_s_score_is_the_log_softmax_of_the_model_s_own_row(
    tokenizer: Tokenizer, temperature: float, rules: LogitRules
) -> None:
    """Neither temperature nor rules enter it; another text beside it, without scores, has rows of its own."""
    session, prompt = HistorySession(tokenizer.vocab_size, 2), (5, 6, 7)
    scheduler = Scheduler(session)
    beside = Wish((9,), Sampling(0.7), new_tokens=12).text(tokenizer)
    text = Wish(prompt, Sampling(temperature, seed=4), logprobs=2, rules=rules).text(tokenizer, owner=1)
    for each in (beside, text):
        scheduler.submit(each)
    new = []
    while scheduler.busy:
        scheduler.step()
        new += text.take()
    assert len(new) == 12
    model = HistorySession(tokenizer.vocab_size, 1)
    for place, each in enumerate(new):
        model.held[0] = [*prompt, *text.state.tokens[:place]]
        row = model.logits(0).astype(np.float64)
        log_p = row - np.log(np.exp(row).sum())
        assert each.score is not None
        assert each.score.logprob == pytest.approx(log_p[each.token], abs=LAST_BITS)
        likely = np.argsort(-log_p, kind="stable")[:2].tolist()
        assert [token for token, _ in each.score.top] == likely
        assert [logprob for _, logprob in each.score.top] == pytest.approx(log_p[likely], abs=LAST_BITS)


def test_the_pace_of_a_prompt_follows_the_time_of_a_step() -> None:
    pace = Pace()
    assert pace.rows(0) > 100
    for _ in range(50):
        pace.update(4, 0, 0.004)
    for _ in range(50):
        rows = pace.rows(4)
        pace.update(4, rows, 0.004 + rows * 0.0001)
    assert pace.rows(4) == 24  # 2.8 ms more, in parts of 8 rows
    for _ in range(50):
        rows = pace.rows(4)
        pace.update(4, rows, 0.004 + rows * 0.002)
    assert pace.rows(4) == 8
