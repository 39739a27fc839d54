from collections import Counter

import numpy as np
import pytest

from jaxgpt.shared.dataset import pack_mask
from jaxgpt.training.batches import Batches


@pytest.mark.parametrize("length", [101, 128, 129, 200])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_epoch_predicts_every_token_but_the_first_exactly_once(length: int, batch_size: int) -> None:
    tokens = np.arange(length, dtype=np.uint16)  # each token names its own position
    batches = Batches(tokens, block_size=16, batch_size=batch_size, seed=0)
    steps = 3 * batches.windows_per_epoch  # a multiple of whole epochs for both batch sizes
    seen: Counter[int] = Counter()
    for step in range(steps):
        inputs, targets = batches.at(step)
        counted = targets >= 0
        assert (inputs[counted] + 1 == targets[counted]).all()
        seen.update(targets[counted].tolist())
    epochs = steps * batch_size // batches.windows_per_epoch
    assert seen == Counter({token: epochs for token in range(1, length)})


def test_batches_depend_on_seed_and_step_alone() -> None:
    tokens = np.random.default_rng(0).integers(1000, size=5000).astype(np.uint16)
    first, second = Batches(tokens, 32, 4, seed=1), Batches(tokens, 32, 4, seed=1)
    order = [70, 3, 0, 121]
    expected = {step: first.at(step) for step in range(125)}
    for step in order:
        for a, b in zip(second.at(step), expected[step], strict=True):
            assert (a == b).all()
    assert not (Batches(tokens, 32, 4, seed=2).at(0)[0] == expected[0][0]).all()


def test_epochs_are_shuffled_differently() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    batches = Batches(tokens, 10, 1, seed=0)
    n = batches.windows_per_epoch
    first = [batches.at(step)[1].max() for step in range(n)]
    second = [batches.at(step)[1].max() for step in range(n, 2 * n)]
    assert first != sorted(first)
    assert first != second


def test_processes_together_see_the_global_batch() -> None:
    tokens = np.random.default_rng(0).integers(1000, size=5000).astype(np.uint16)
    whole, part = Batches(tokens, 32, 8, seed=0), Batches(tokens, 32, 8, seed=0)
    for step in (0, 50):
        halves = [part.at(step, rows)[0] for rows in (slice(0, 4), slice(4, 8))]
        assert (np.concatenate(halves) == whole.at(step)[0]).all()


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_micro_batches_are_the_batch_cut(accumulate: int) -> None:
    tokens = np.random.default_rng(0).integers(1000, size=5000).astype(np.uint16)
    batches, size = Batches(tokens, 16, 8, seed=0), 8 // accumulate
    for step in (0, 7):
        whole = batches.at(step)
        for expected, found in zip(whole, batches.micro(step, accumulate, slice(None)), strict=True):
            assert found.shape == (accumulate, size, 16)
            assert (found.reshape(8, 16) == expected).all()
        halves = [
            batches.micro(step, accumulate, rows)[1] for rows in (slice(0, size // 2), slice(size // 2, size))
        ]
        assert (np.concatenate(halves, axis=1).reshape(8, 16) == whole[1]).all()


def test_of_masked_tokens_an_epoch_predicts_those_that_count() -> None:
    tokens = np.arange(200, dtype=np.uint16)  # each token names its own position
    counts = np.random.default_rng(0).integers(2, size=200).astype(bool)
    batches = Batches(tokens, 16, 1, 0, pack_mask(counts))
    found = [batches.at(step)[1] for step in range(batches.windows_per_epoch)]
    targets = np.concatenate(found).ravel()
    assert np.sort(targets[targets >= 0]).tolist() == [i for i in np.flatnonzero(counts) if i > 0]


def test_of_prompts_so_large_a_share_counts_as_their_weight_says() -> None:
    """Other ones in each epoch, the same ones whenever a step is asked for; of answers all."""
    tokens = np.arange(20_000, dtype=np.uint16)
    counts = np.random.default_rng(0).integers(2, size=len(tokens)).astype(bool)
    prompts = int((~counts[1:]).sum())

    def of_epoch(batches: Batches, epoch: int) -> set[int]:
        steps = range(epoch * batches.windows_per_epoch, (epoch + 1) * batches.windows_per_epoch)
        targets = np.concatenate([batches.at(step)[1] for step in steps]).ravel()
        return {int(token) for token in targets[targets >= 0]}

    answers = set(np.flatnonzero(counts).tolist()) - {0}
    for weight in (0.0, 0.1, 0.7, 1.0):
        batches = Batches(tokens, 16, 1, 0, pack_mask(counts), weight)
        first, second = of_epoch(batches, 0), of_epoch(batches, 1)
        assert answers <= first
        assert answers <= second
        # Four standard deviations of so many draws.
        spread = 4 * (prompts * weight * (1 - weight)) ** 0.5
        for drawn in (first - answers, second - answers):
            assert abs(len(drawn) - prompts * weight) <= spread
        assert (first == second) == (weight in (0.0, 1.0))
        assert of_epoch(Batches(tokens, 16, 1, 0, pack_mask(counts), weight), 1) == second
