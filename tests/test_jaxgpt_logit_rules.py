"""What a request changes in the logits: the arithmetic of bias and penalties, by OpenAI's formula."""

import numpy as np

from jaxgpt.generation.scheduling.logit_rules import LogitRules


class CountingDict(dict[int, float]):
    """A dict that counts how often somebody walks over it."""

    walks = 0

    def __iter__(self):  # type: ignore[no-untyped-def]
        self.walks += 1
        return super().__iter__()

    def items(self):  # type: ignore[no-untyped-def]
        self.walks += 1
        return super().items()


def test_bias_and_penalties_are_those_of_the_formula() -> None:
    rules = LogitRules(bias={1: 2.0}, frequency_penalty=0.5, presence_penalty=0.25)
    changed = rules.apply(np.zeros(4, np.float32), [2, 2, 3])  # mu - c * frequency - (c > 0) * presence
    assert changed.tolist() == [0.0, 2.0, -1.25, -0.75]
    assert rules.apply(np.zeros(4, np.float32), []).tolist() == [0.0, 2.0, 0.0, 0.0]
    assert LogitRules({}, 0.25, 0.5) == LogitRules(presence_penalty=0.25, frequency_penalty=0.5)


def test_a_bias_is_added_in_float32_token_by_token_and_read_once() -> None:
    random = np.random.default_rng(0)
    logits = random.standard_normal(500).astype(np.float32)
    bias = CountingDict({int(t): float(random.uniform(-100, 100)) for t in random.permutation(500)[:300]})
    right = logits.copy()
    for token, value in dict(bias).items():
        right[token] = np.float32(right[token] + np.float32(value))
    bias.walks = 0
    rules = LogitRules(bias)
    first = rules.apply(logits, [1])
    walks = bias.walks
    assert first.tobytes() == rules.apply(logits, [1]).tobytes() == right.tobytes()
    assert bias.walks == walks
