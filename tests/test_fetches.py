"""Which fetches readers need: decisions, as plain asserts."""

from __future__ import annotations

import itertools
import random

import pytest

from streamfs.engine.fetches import (
    FAR_GROWTH,
    FIRST_AHEAD,
    LEAST_GAP,
    MANY_JUMPS,
    MOST_FETCHES,
    MOST_GAP,
    OPEN_ENDED,
    REORDER,
    SPARING,
    Fetch,
    FetchPlan,
)

KIB, MIB = 1 << 10, 1 << 20
READ_AHEAD = 8 * MIB


def plan_of(*, ranged: bool = True, read_ahead: int = READ_AHEAD) -> FetchPlan:
    return FetchPlan(ranged=ranged, read_ahead=read_ahead)


def demanded(plan: FetchPlan, missing: int, size: int = 128 * KIB) -> Fetch:
    fetch = plan.demand(missing, missing + size)
    assert fetch is not None
    return fetch


def brought(fetch: Fetch, position: int | None = None) -> None:
    """The fetch has gone to its limit, or to `position`."""
    target = fetch.limit if position is None else position
    assert target is not None
    fetch.position = target


def test_a_first_read_asks_for_a_small_window() -> None:
    fetch = demanded(plan_of(), 10 * MIB)
    assert (fetch.position, fetch.limit, fetch.window()) == (10 * MIB, 10 * MIB + FIRST_AHEAD, 10 * MIB + FIRST_AHEAD)


def test_a_large_first_read_is_asked_for_whole() -> None:
    assert demanded(plan_of(), 0, MIB).window() == MIB


@pytest.mark.parametrize(("latency", "growth"), [(None, 2), (0.001, 2), (0.05, FAR_GROWTH)])
def test_the_window_grows_as_a_reader_reads_on_and_ends_at_the_read_ahead(latency: float | None, growth: int) -> None:
    """Each step costs a round trip, so where those are long there are fewer."""
    plan = plan_of()
    if latency is not None:
        plan.measured(latency, 1e8)
    fetch = demanded(plan, 0)
    aheads = []
    position = 0
    while position < 200 * MIB:
        brought(fetch)
        position += 128 * KIB
        assert plan.follow(position, fetch.position) is fetch
        aheads.append(fetch.ahead)
        assert fetch.limit is not None
        assert fetch.limit <= position + READ_AHEAD
    assert aheads == sorted(aheads)
    assert {b // a for a, b in itertools.pairwise(aheads) if b < READ_AHEAD} == {1, growth}
    assert aheads[-1] == READ_AHEAD


def test_a_fetch_whose_window_has_grown_is_asked_open_ended() -> None:
    fetch = Fetch(0, 0, 8 * MIB, OPEN_ENDED)
    assert fetch.window() is None
    fetch.ahead = OPEN_ENDED - 1
    assert fetch.window() == 8 * MIB


def test_a_reader_a_little_ahead_waits_for_the_fetch_to_read_through_the_gap() -> None:
    plan = plan_of()
    fetch = demanded(plan, 0)
    brought(fetch)
    assert plan.demand(FIRST_AHEAD + LEAST_GAP, FIRST_AHEAD + LEAST_GAP + 10) is None
    assert len(plan.fetches) == 1
    assert not fetch.resting
    assert fetch.limit is not None
    assert fetch.limit >= FIRST_AHEAD + LEAST_GAP + 10


def test_parallel_read_ahead_of_the_kernel_is_served_by_one_fetch_in_any_order() -> None:
    requests = [(at, at + 128 * KIB) for at in range(0, 4 * MIB, 128 * KIB)]
    for seed in range(20):
        plan = plan_of()
        demanded(plan, 0)
        shuffled = [r for i in range(0, len(requests), 8) for r in random.Random(seed).sample(requests[i : i + 8], 8)]
        assert all(plan.demand(*request) is None for request in shuffled)


def test_a_jump_starts_a_second_fetch_and_leaves_the_first_where_it_is() -> None:
    plan = plan_of()
    first = demanded(plan, 0)
    limit = first.limit
    second = demanded(plan, 100 * MIB)
    assert plan.fetches == [first, second]
    assert first.limit == limit


def test_a_jump_back_starts_a_fetch() -> None:
    plan = plan_of()
    demanded(plan, 10 * MIB)
    assert demanded(plan, 10 * MIB - 1).position == 10 * MIB - 1


def test_just_past_the_reach_of_a_fetch_another_starts() -> None:
    plan = plan_of()
    reach = demanded(plan, 0).wanted + REORDER
    assert plan.demand(reach, reach + 1) is None
    plan = plan_of()
    demanded(plan, 0)
    assert plan.demand(reach + 1, reach + 2) is not None


def test_the_gap_that_is_read_through_follows_latency_times_rate_within_bounds() -> None:
    for latency, rate, gap in ((0.1, 10 * MIB, MIB), (0.001, 1000, LEAST_GAP), (10, 100 * MIB, MOST_GAP)):
        plan = plan_of()
        plan.measured(latency, rate)
        fetch = demanded(plan, 0, 1)
        fetch.position, fetch.wanted = 10 * MIB, 0
        assert plan.demand(10 * MIB + gap, 10 * MIB + gap + 1) is None
        fetch.wanted = 0
        assert plan.demand(10 * MIB + gap + 1, 10 * MIB + gap + 2) is not None


def test_one_way_sources_have_one_fetch_from_the_start() -> None:
    plan = plan_of(ranged=False)
    fetch = demanded(plan, 50 * MIB, 10)
    assert fetch.position == 0
    assert plan.demand(500 * MIB, 500 * MIB + 10) is None
    assert plan.demand(5, 10) is None
    assert fetch.limit == 500 * MIB + 10


def test_the_opening_fetch_goes_no_further_than_its_read_ahead_past_the_first_reader() -> None:
    for ranged in (True, False):
        plan = plan_of(ranged=ranged, read_ahead=256 * KIB)
        fetch = plan.first()
        fetch.position = 100
        plan.follow(10, 100)
        assert fetch.limit is not None
        assert fetch.limit <= 10 + 256 * KIB


def test_no_fetch_is_ever_allowed_more_than_the_read_ahead_past_the_furthest_reader() -> None:
    for seed in range(200):
        dice = random.Random(seed)
        plan = plan_of(ranged=dice.random() < 0.5, read_ahead=dice.choice([FIRST_AHEAD, MIB, READ_AHEAD]))
        furthest = 0
        if dice.random() < 0.5:
            plan.first()
        for _ in range(200):
            at, size = dice.randrange(0, 64 * MIB), dice.choice([1, 4 * KIB, MIB])
            step = dice.randrange(6)
            if step == 0:
                furthest = max(furthest, at + size)
                plan.demand(at, at + size)
            elif step == 1 and plan.fetches:
                fetch = dice.choice(plan.fetches)
                read = dice.randrange(fetch.start, fetch.position + 1)
                furthest = max(furthest, read)
                plan.follow(read, fetch.position)
            elif step == 2 and plan.fetches:
                fetch = dice.choice(plan.fetches)
                assert fetch.limit is not None
                fetch.position = max(fetch.position, dice.randint(fetch.position, max(fetch.limit, fetch.position)))
            elif step == 3 and plan.fetches and dice.random() < 0.2:
                plan.ended(dice.choice(plan.fetches))
            elif step == 4 and dice.random() < 0.1:
                plan.release()
            for fetch in plan.fetches:
                assert fetch.limit is not None
                assert fetch.limit <= furthest + plan.read_ahead


def test_when_all_fetches_are_busy_nobody_gets_another_and_none_is_spare() -> None:
    plan = plan_of()
    for place in range(MOST_FETCHES):
        demanded(plan, place * 100 * MIB)
    assert plan.crowded
    assert plan.demand(5000 * MIB, 5001 * MIB) is None
    assert plan.spare(5000 * MIB) is None


def test_a_resting_fetch_gives_its_place_where_all_are_taken() -> None:
    plan = plan_of()
    fetches = [demanded(plan, place * 100 * MIB) for place in range(MOST_FETCHES)]
    brought(fetches[3])
    assert plan.demand(5000 * MIB, 5001 * MIB) is None
    assert plan.spare(5000 * MIB) is fetches[3]
    plan.ended(fetches[3])
    assert plan.demand(5000 * MIB, 5001 * MIB) is not None


def test_none_is_spare_for_a_reader_that_a_fetch_under_way_will_serve() -> None:
    plan = plan_of()
    fetches = [demanded(plan, place * 100 * MIB) for place in range(MOST_FETCHES)]
    brought(fetches[3])
    assert plan.demand(100 * MIB, 101 * MIB) is None
    assert plan.spare(100 * MIB) is None


def test_release_stops_every_fetch_where_it_is() -> None:
    plan = plan_of()
    fetch = demanded(plan, 0)
    fetch.position = 10
    plan.release()
    assert fetch.resting


def test_release_does_not_stop_a_greedy_fetch() -> None:
    plan = plan_of()
    fetch = demanded(plan, 0)
    plan.want_all()
    plan.release()
    assert fetch.limit is None
    assert fetch.window() is None
    assert demanded(plan, 100 * MIB).limit is None


def test_after_greed_readers_rule_again() -> None:
    plan = plan_of()
    fetch = demanded(plan, 0)
    plan.want_all()
    fetch.position = 5 * MIB
    plan.want_no_more()
    assert fetch.resting
    assert plan.demand(5 * MIB, 5 * MIB + 10) is None
    assert not fetch.resting


@pytest.mark.parametrize("ranged", [True, False])
def test_a_reader_that_follows_moves_only_the_fetch_it_follows(ranged: bool) -> None:
    plan = plan_of(ranged=ranged)
    fetch = demanded(plan, 0)
    brought(fetch)
    assert plan.follow(FIRST_AHEAD // 2, fetch.position) is fetch
    assert (plan.follow(FIRST_AHEAD // 2, fetch.position - 1) is fetch) is not ranged


def test_a_small_read_of_what_is_there_starts_no_request_of_its_own() -> None:
    plan = plan_of()
    fetch = demanded(plan, 10 * MIB, 4 * KIB)
    brought(fetch)
    assert plan.follow(10 * MIB + 4 * KIB, fetch.position) is fetch
    assert fetch.resting
    assert plan.follow(10 * MIB + FIRST_AHEAD // 2, fetch.position) is fetch
    assert fetch.limit == 10 * MIB + FIRST_AHEAD // 2 + FIRST_AHEAD


def test_where_another_fetch_stands_there_is_nothing_to_do() -> None:
    plan = plan_of()
    first, second = demanded(plan, 0), demanded(plan, 10 * MIB)
    second.position = 12 * MIB
    assert plan.is_served(12 * MIB, first)
    assert not plan.is_served(12 * MIB, second)
    assert not plan.is_served(11 * MIB, first)


def jumped(plan: FetchPlan, places: int) -> None:
    """A read here and a read there, and nobody reads on from either."""
    for place in range(places):
        fetch = demanded(plan, (100 + 10 * place) * MIB, 4 * KIB)
        brought(fetch)
        plan.ended(fetch)


def test_reads_here_and_there_come_to_bring_what_is_asked_alone() -> None:
    plan = plan_of()
    jumped(plan, MANY_JUMPS)
    fetch = demanded(plan, 50 * MIB, 4 * KIB)
    assert (fetch.limit, fetch.window(), fetch.ahead) == (50 * MIB + 4 * KIB, 50 * MIB + 4 * KIB, 0)


def test_a_jump_is_begun_only_where_a_demand_would_bring_no_more_than_it_asks_for() -> None:
    plan = plan_of()
    jumped(plan, MANY_JUMPS)
    assert plan.jump(50 * MIB, 50 * MIB + KIB) is None, "not one too few"
    jumped(plan, 1)
    fetch = plan.jump(50 * MIB, 50 * MIB + KIB)
    assert fetch is not None
    assert (fetch.start, fetch.limit, fetch.ahead) == (50 * MIB, 50 * MIB + KIB, 0)
    assert plan.jump(50 * MIB + KIB, 50 * MIB + 2 * KIB) is None, "that one brings it"
    brought(fetch)
    plan.ended(fetch)
    assert plan.jump(50 * MIB + KIB, 50 * MIB + 2 * KIB) is None, "its reader reads on"
    withdrawn = plan.jump(60 * MIB, 60 * MIB + KIB)
    assert withdrawn is not None
    plan.withdraw(withdrawn)
    assert plan.fetches == []
    assert demanded(plan, 60 * MIB, KIB).ahead == 0
    plan.want_all()
    assert plan.jump(70 * MIB, 70 * MIB + KIB) is None


def test_no_jump_is_begun_where_all_fetches_are_busy() -> None:
    plan = plan_of()
    jumped(plan, MANY_JUMPS + 1)
    for place in range(MOST_FETCHES):
        assert plan.jump(3 * place * MIB, 3 * place * MIB + KIB) is not None
    assert plan.jump(50 * MIB, 50 * MIB + KIB) is None


def test_two_places_beside_each_other_by_chance_change_little_where_many_were_far_apart() -> None:
    plan = plan_of()
    jumped(plan, 10 * MANY_JUMPS)
    fetch = demanded(plan, 50 * MIB, 4 * KIB)
    assert plan.demand(50 * MIB + 8 * KIB, 50 * MIB + 12 * KIB) is None
    fetch.position = 50 * MIB + 12 * KIB
    plan.ended(fetch)
    assert demanded(plan, 70 * MIB, 4 * KIB).ahead == 0


def test_a_read_that_asks_once_more_is_no_sign_of_reading_on() -> None:
    plan = plan_of()
    jumped(plan, MANY_JUMPS)
    fetch = demanded(plan, 50 * MIB, 4 * KIB)
    for _ in range(10):
        assert plan.demand(50 * MIB, 50 * MIB + 4 * KIB) is None
    assert (fetch.limit, fetch.ahead) == (50 * MIB + 4 * KIB, 0)
    brought(fetch)
    plan.ended(fetch)
    assert demanded(plan, 70 * MIB, 4 * KIB).ahead == 0


def test_where_a_program_reads_here_and_there_a_resting_fetch_is_not_read_on_for_what_lies_far_ahead() -> None:
    plan = plan_of()
    jumped(plan, MANY_JUMPS)
    fetch = demanded(plan, 50 * MIB, 4 * KIB)
    brought(fetch)
    far = demanded(plan, fetch.position + MIB // 2, 4 * KIB)
    assert (far.start, far.limit) == (fetch.position + MIB // 2, fetch.position + MIB // 2 + 4 * KIB)


def test_reading_on_after_many_jumps_brings_read_ahead_back() -> None:
    plan = plan_of()
    jumped(plan, MANY_JUMPS + 3)
    fetch = demanded(plan, 50 * MIB, 4 * KIB)
    brought(fetch)
    plan.ended(fetch)
    again = demanded(plan, 50 * MIB + 4 * KIB, 4 * KIB)
    assert again.limit == 50 * MIB + 4 * KIB + FIRST_AHEAD
    brought(again)
    assert plan.demand(again.position, again.position + 4 * KIB) is None
    assert again.ahead == 2 * FIRST_AHEAD


def test_a_fetch_without_read_ahead_that_is_read_on_while_it_runs_gets_some() -> None:
    plan = plan_of()
    jumped(plan, MANY_JUMPS)
    fetch = demanded(plan, 50 * MIB, 4 * KIB)
    brought(fetch)
    assert plan.demand(50 * MIB + 4 * KIB, 50 * MIB + 8 * KIB) is None
    assert fetch.limit == 50 * MIB + 8 * KIB + FIRST_AHEAD


def test_a_sparing_reader_gets_what_it_asks_for_and_nothing_ahead() -> None:
    plan = plan_of()
    opening = plan.first(SPARING)
    assert (opening.limit, opening.window()) == (SPARING, SPARING)
    assert plan.demand(0, 4096, sparing=True) is None
    assert opening.limit == SPARING
    opening.position = SPARING
    assert plan.demand(SPARING, 2 * SPARING, sparing=True) is None
    assert opening.limit == 2 * SPARING
    far = plan.demand(10 * MIB, 10 * MIB + 4096, sparing=True)
    assert far is not None
    assert far.limit == 10 * MIB + SPARING


def test_a_reader_after_a_sparing_one_gets_its_read_ahead() -> None:
    plan = plan_of()
    opening = plan.first(SPARING)
    opening.position = SPARING
    assert plan.demand(SPARING, SPARING + 4096) is None
    assert opening.limit == SPARING + 4096 + FIRST_AHEAD
