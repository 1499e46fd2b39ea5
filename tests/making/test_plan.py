"""Plans: what fits into the time, and what is said where nothing does."""

from dataclasses import replace

import pytest

from cllm.errors import UsageError
from cllm.making.plan import EPOCHS, Costs, make_plan

COSTS = Costs(response=0.5, example=0.8, token=0.03, tokens=100.0, sampled=16, spent=40.0, memory=2**31, batch=4, at_once=4)


@pytest.mark.parametrize("minutes", [10.0, 15.0, 30.0, 60.0, 600.0])
def test_a_plan_stays_within_its_time_and_uses_it(minutes: float) -> None:
    found = make_plan(COSTS, 5000, 64, minutes)
    assert found.total_minutes <= 0.95 * minutes
    assert found.total_minutes > 0.8 * minutes or (found.prompts == 5000 and found.epochs == EPOCHS)
    assert 1 <= found.epochs <= EPOCHS and COSTS.sampled <= found.prompts <= 5000 and 2 <= found.held_out <= 64
    assert found.response_tokens == found.prompts * 100 and found.trained_tokens == found.response_tokens * found.epochs


def test_more_time_is_more_prompts_then_more_epochs() -> None:
    plans = [make_plan(COSTS, 400, 64, minutes) for minutes in (10, 20, 40, 80)]
    assert [p.prompts for p in plans] == sorted(p.prompts for p in plans) and plans[-1].prompts == 400
    assert plans[0].epochs == 1 < plans[-1].epochs and all(p.prompts == 400 for p in plans if p.epochs > 1)


def test_responses_that_take_long_are_learned_from_more_often() -> None:
    slow = replace(COSTS, response=2.0)  # 2.5 times as long as an epoch of it
    assert make_plan(slow, 5000, 64, 30).epochs == 3 and make_plan(slow, 5000, 64, 30).total_minutes <= 0.95 * 30


def test_without_a_limit_all_prompts_are_taken_and_few_more_often() -> None:
    epochs = [make_plan(COSTS, count, 64, None).epochs for count in (16, 200, 533, 5000)]
    assert epochs == [EPOCHS, 8, 3, 1]
    assert make_plan(COSTS, 5000, 64, None).prompts == 5000 and make_plan(COSTS, 5000, 64, None).held_out == 64


def test_a_time_that_is_too_short_says_how_much_is_needed() -> None:
    for costs in (COSTS, replace(COSTS, response=2.0)):
        with pytest.raises(UsageError, match=r"minutes must be at least (\S+) for this model on this device, got 0.1") as error:
            make_plan(costs, 100, 20, 0.1)
        least = float(str(error.value).split()[5])
        found = make_plan(costs, 100, 20, least)
        assert COSTS.sampled <= found.prompts < COSTS.sampled + 8 and found.epochs == 1 and found.total_minutes <= least
        with pytest.raises(UsageError):
            make_plan(costs, 100, 20, least - 0.1)


def test_measuring_makes_up_for_slow_and_fast_stages() -> None:
    plan = make_plan(COSTS, 5000, 64, 15.0)
    left = 60 * plan.minutes["measure"]
    assert [plan.measurable(seconds, 64) for seconds in (-5.0, 0.0, left, 2 * left, 1000 * left)] == [
        2, 2, plan.held_out, 2 * plan.held_out, 64,
    ]  # fmt: skip


def test_long_responses_do_not_lengthen_tuning() -> None:
    short, long, longer = (make_plan(replace(COSTS, tokens=tokens), 100, 20, None).minutes["tune"] for tokens in (32.0, 64.0, 400.0))
    assert short < long == longer


def test_what_people_see() -> None:
    text = str(make_plan(replace(COSTS, memory=3 * 2**30), 100, 20, None))
    assert "100 to learn from, in 10 epochs; about 20 to measure on" in text and "10000 of responses" in text and "3.0 GiB" in text
