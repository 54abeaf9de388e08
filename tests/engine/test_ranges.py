from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from streamfs.engine.ranges import Range, RangeSet

LIMIT = 40
offsets = st.integers(0, LIMIT)
edits = st.lists(st.tuples(st.sampled_from(["add", "discard"]), offsets, offsets), max_size=30)


def built(steps: list[tuple[str, int, int]]) -> tuple[RangeSet, set[int]]:
    ranges, model = RangeSet(), set()
    for step, start, stop in steps:
        getattr(ranges, step)(start, stop)
        if step == "add":
            model |= set(range(start, stop))
        else:
            model -= set(range(start, stop))
    return ranges, model


@given(edits)
def test_holds_what_a_set_of_integers_holds_in_sorted_disjoint_untouching_ranges(steps):
    ranges, model = built(steps)
    assert {x for r in ranges for x in range(r.start, r.stop)} == model
    assert ranges.total == len(model)
    assert bool(ranges) == bool(model)
    pairs = list(ranges)
    assert len(ranges) == len(pairs)
    assert all(r.start < r.stop for r in pairs)
    assert all(a.stop < b.start for a, b in pairwise(pairs))


@given(edits, offsets, offsets)
def test_answers_as_a_set_of_integers_would(steps, start, stop):
    ranges, model = built(steps)
    end = start
    while end in model:
        end += 1
    assert ranges.run_end(start) == end
    assert ranges.next_start(start) == min((x for x in model if x >= start), default=None)
    absent = [x for x in range(start, stop) if x not in model]
    assert ranges.first_gap(start, stop) == (absent[0] if absent else None)
    assert ranges.covers(start, stop) == (not absent)


@given(edits)
def test_equal_where_the_members_are_equal_however_they_came(steps):
    ranges, model = built(steps)
    assert ranges == RangeSet((x, x + 1) for x in sorted(model, key=lambda x: x * 7 % 41))
    ranges.add(LIMIT + 5, LIMIT + 6)
    assert ranges != RangeSet((x, x + 1) for x in model)


def test_touching_ranges_become_one():
    assert list(RangeSet([(0, 5), (10, 15), (5, 10)])) == [Range(0, 15)]


def test_taking_the_middle_out_leaves_both_ends():
    ranges = RangeSet([(0, 10)])
    ranges.discard(3, 7)
    assert list(ranges) == [Range(0, 3), Range(7, 10)]
    assert ranges.total == 6


def test_offsets_past_64_bits_are_only_numbers():
    ranges = RangeSet([(2**70, 2**70 + 5)])
    assert ranges.total == 5
    assert ranges.next_start(0) == 2**70
