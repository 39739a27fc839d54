from jaxgpt.generation.prompt_lookup import ALLOWED_LOSS, PromptLookup


def settled(tokens: list[int], max_tokens: int = 8) -> PromptLookup:
    lookup = PromptLookup(tokens, max_tokens)
    lookup.update(0, 0, 1.0)
    return lookup


def test_the_latest_place_that_went_the_same_way_is_continued() -> None:
    assert settled([7, 1, 2, 3, 9, 9, 1, 2, 4, 5, 6, 1, 2]).draft(10) == [4, 5, 6]
    assert settled([1, 2, 3, 4, 8, 5, 2, 3, 4, 9, 1, 2, 3, 4]).draft(10) == [8, 5, 2]  # four before three
    assert settled([1, 2, 3, 4, 5]).draft(10) == []


def test_room_and_the_first_plain_step_are_waited_for() -> None:
    text = [1, 2, 3, 1, 2]
    assert PromptLookup(text, 8).draft(10) == []
    assert settled(text).draft(0) == []
    assert settled(text).draft(2) == [3, 1]
    assert settled(text, max_tokens=0).draft(10) == []


def test_guesses_grow_while_they_stand_and_shrink_when_not() -> None:
    text = list(range(10)) * 3
    lookup = settled(text, max_tokens=6)
    assert len(lookup.draft(20)) == 3
    lookup.update(3, 3, 1.2)
    assert len(lookup.draft(20)) == 6
    lookup.update(6, 0, 1.2)
    assert len(lookup.draft(20)) == 3
    assert (lookup.drafted, lookup.accepted) == (9, 3)


def test_patience_grows_where_nothing_is_guessed() -> None:
    lookup = PromptLookup([1, 2, 3, 4], 8)
    found = []
    for _ in range(4):
        found.append(lookup.patience)
        lookup.update(0, 0, 1.0, lookup.patience)
    assert found == [1, 2, 4, 8]
    lookup.update(3, 1, 1.0)
    assert lookup.patience == 1
    lookup.update(3, 0, 1.0)
    assert lookup.patience == 2


def test_a_guess_pays_against_the_time_of_a_token_made_in_a_burst() -> None:
    """Eight tokens of a burst take 4 s: a guess that takes 1 s and brings one token more is even."""
    lookup = PromptLookup([1, 2, 3, 1, 2], 8)
    lookup.update(0, 0, 4.0, 8)
    lookup.update(3, 1, 1.0)
    assert lookup.draft(8)
    lookup.update(3, 0, 1.0)
    assert not lookup.draft(8)


def test_wrong_guesses_cost_no_more_than_allowed() -> None:
    """A text that looks as if it repeated itself and never does, and guesses that double a step's time."""
    lookup = settled([1, 2, 3, 1, 2], max_tokens=8)
    plain, spent = 1, 1.0
    for _ in range(5000):
        guessed = lookup.draft(8)
        seconds = 2.0 if guessed else 1.0
        lookup.update(len(guessed), 0, seconds)
        spent += seconds
        plain += 1
    assert lookup.drafted > 0
    assert spent <= plain / (1 - ALLOWED_LOSS) + 2  # the loss is a share of all time spent
