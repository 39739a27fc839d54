from collections import Counter

import numpy as np
import pytest

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
