"""The label store against union-find by hand."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lilliput.mechanisms.groups.labels import Context, Labels

PAIRS = st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=25)


def components(size: int, pairs: list[tuple[int, int]]) -> list[int]:
    """The smallest member of each one's component, by merging until nothing changes."""
    smallest = list(range(size))
    for _ in range(size):
        for a, b in pairs:
            smallest[a] = smallest[b] = min(smallest[a], smallest[b])
    return smallest


@given(PAIRS)
def test_components_are_those_of_union_find(pairs: list[tuple[int, int]]) -> None:
    labels = Labels()
    labels.new(19)
    for a, b in pairs:
        labels.equate(np.array([a]), np.array([b]))
    found, known = labels.solve(), components(20, pairs)
    live = found.live(np.arange(20))
    for a in range(20):
        assert live[a] == (known[a] != 0)
        for b in range(20):
            if known[a] != 0 or known[b] != 0:  # what stays need not be one component
                assert (found.of[a] == found.of[b]) == (known[a] == known[b])


def test_equating_broadcasts() -> None:
    labels = Labels()
    a, b = labels.new(6), labels.new(3)
    labels.equate(a.reshape(2, 3), b[None])
    of = labels.solve().of
    assert (of[a] == of[np.tile(b, 2)]).all()


def test_a_reason_reaches_everything_equated() -> None:
    labels = Labels()
    a, b, c = labels.new(2), labels.new(2), labels.new(2)
    labels.equate(a, b)
    labels.context = Context("sort", "head")
    labels.fix(b[:1], "order matters")
    found = labels.solve()
    assert found.live(a).tolist() == [False, True]
    assert found.reason(a) == "order matters (sort in 'head')"
    assert found.live(c).all()


def test_meeting_a_dim_that_stays_fixes() -> None:
    labels = Labels()
    a = labels.new(3)
    labels.equate(a, np.array([0, -4, int(a[2])]))
    assert labels.solve().live(a).tolist() == [False, False, True]


def test_what_is_fixed_after_solving_stays_fixed() -> None:
    labels = Labels()
    a = labels.new(3)
    found = labels.solve()
    found.fix(a[1:], "the code says 2", Context())
    assert found.live(a).tolist() == [True, False, False]
    assert found.reason(a) == "the code says 2"


def test_still_dims_are_the_same_object_and_cannot_be_written() -> None:
    labels = Labels()
    assert labels.still(4) is labels.still(4)
    assert not labels.is_live(labels.still(4))
    assert not labels.still(4).flags.writeable
