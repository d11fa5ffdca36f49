"""Whose turn it is, on paper: groups of sizes, seats, priorities, requests that come and go."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from inferfleet.engine.diffusion.turns import Group, Move, Paint, Prepare, Row, Turns

SMALL, LARGE, WIDE = Group(8, 8, 16), Group(32, 32, 16), Group(8, 16, 16)


class Paper:
    """An engine that computes nothing: it does what the turns say and writes it down."""

    def __init__(self, max_batch_size: int = 4) -> None:
        self.turns = Turns(max_batch_size)
        self.log: list = []
        self.arrivals = 0

    def add(self, name: str, group: Group = SMALL, *, n: int = 1, steps: int = 2, priority: int = 0) -> None:
        self.turns.add([Row(name, index, group, steps, priority, self.arrivals) for index in range(n)])
        self.arrivals += 1

    def unit(self):
        unit = self.turns.next()
        match unit:
            case Prepare(id=name):
                self.turns.prepared(name)
                self.log.append(("prepare", name))
            case Move(rows=rows):
                self.log.append(("move", rows[0].group, tuple(row.id for row in rows)))
                self.turns.moved(rows[0].group, rows)
            case Paint(row=row):
                self.turns.painted(row)
                self.log.append(("paint", row.id))
        return unit

    def run(self, most: int = 10_000) -> list:
        for _ in range(most):
            if self.unit() is None:
                return self.log
        raise AssertionError("no end")

    def moves(self) -> list[tuple[Group, tuple[str, ...]]]:
        return [entry[1:] for entry in self.log if entry[0] == "move"]


def test_one_picture_is_prepared_moved_and_painted():
    paper = Paper()
    paper.add("a", steps=3)
    assert paper.run() == [("prepare", "a"), *[("move", SMALL, ("a",))] * 3, ("paint", "a")]
    assert not paper.turns.has_work


def test_requests_of_one_size_share_steps_though_they_came_at_different_times():
    # Given one that has begun,
    paper = Paper()
    paper.add("a", steps=4)
    paper.unit(), paper.unit()
    # when another comes, then it joins at the next step, and leaves when it is done.
    paper.add("b", steps=2)
    paper.run()
    assert [names for _, names in paper.moves()] == [("a",), ("a", "b"), ("a", "b"), ("a",)]


def test_sizes_take_turns_however_many_pictures_each_has():
    paper = Paper()
    paper.add("many", n=8, steps=4)
    paper.add("large", LARGE, steps=4)
    paper.add("wide", WIDE, steps=4)
    paper.run()
    # While all three are there, nobody moves twice before the others have moved once.
    groups = [group for group, _ in paper.moves()][:12]
    assert [set(groups[start : start + 3]) for start in (0, 3, 6, 9)] == [{SMALL, LARGE, WIDE}] * 4


def test_a_new_size_waits_no_longer_than_one_round():
    paper = Paper()
    paper.add("a", steps=20)
    paper.add("b", LARGE, steps=20)
    for _ in range(8):
        paper.unit()
    paper.add("c", WIDE, steps=2)
    before = len(paper.moves())
    paper.run()
    assert WIDE in [group for group, _ in paper.moves()[before : before + 3]]


def test_no_more_pictures_move_than_there_are_seats_and_started_ones_keep_theirs():
    # Given more pictures than seats, all started ones long, and one that is more urgent,
    paper = Paper(max_batch_size=2)
    for name in "abcd":
        paper.add(name, steps=3)
    paper.unit(), paper.unit(), paper.unit()
    paper.add("urgent", steps=3, priority=-1)
    paper.run()
    # then those who have begun finish, the urgent one is next, and the others follow in order.
    order = [names for _, names in paper.moves()]
    assert all(len(names) <= 2 for names in order)
    assert order[:3] == [("a", "b")] * 3
    assert set(order[3]) == {"urgent", "c"}
    ends = [entry[1] for entry in paper.log if entry[0] == "paint"]
    assert ends == ["a", "b", "urgent", "c", "d"]


def test_a_finished_picture_is_painted_before_anything_else_moves():
    paper = Paper()
    paper.add("short", steps=1)
    paper.add("long", steps=3)
    paper.add("other", LARGE, steps=3)
    log = paper.run()
    done = next(place for place, entry in enumerate(log) if entry[0] == "move" and "short" in entry[2])
    assert log[done + 1] == ("paint", "short")


def test_a_flood_of_new_prompts_does_not_stop_those_who_paint():
    # Given one that paints, when a new request comes before every unit,
    paper = Paper(max_batch_size=3)
    paper.add("first", steps=5)
    for number in range(40):
        paper.add(f"new-{number}", Group(8, 8, 16 + number), steps=50)
        paper.unit()
    # then between two moves there are never more than three preparations.
    runs = "".join(entry[0][0] for entry in paper.log).split("m")
    assert max(run.count("p") for run in runs) <= 3


def test_what_cannot_be_seated_is_not_prepared_yet():
    paper = Paper(max_batch_size=2)
    for name in "abc":
        paper.add(name, steps=2)
    for _ in range(3):
        paper.unit()
    assert ("prepare", "c") not in paper.log
    paper.run()
    assert ("paint", "c") in paper.log


def test_dropped_requests_leave_nothing_behind_wherever_they_are():
    # Given one that waits, one that is prepared, one that moves, one that is done,
    paper = Paper(max_batch_size=2)
    paper.add("done", steps=1)
    paper.add("moving", steps=5, n=2)
    paper.add("waiting", steps=5)
    while ("paint", "done") not in paper.log and not isinstance(paper.turns.next(), Paint):
        paper.unit()
    # when all are dropped, then there is no work, and no size is remembered.
    for name in ("done", "moving", "waiting", "nobody"):
        paper.turns.drop(name)
    assert not paper.turns.has_work
    assert paper.turns.next() is None
    assert (paper.turns.num_seated, paper.turns.num_waiting, paper.turns.num_groups) == (0, 0, 0)


def test_when_all_that_was_prepared_is_dropped_the_rest_goes_on():
    paper = Paper(max_batch_size=1)
    paper.add("a")
    paper.add("b")
    paper.unit()
    paper.turns.drop("a")
    assert paper.run()[-1] == ("paint", "b")


def test_where_memory_did_not_suffice_fewer_move_until_that_size_is_gone():
    paper = Paper(max_batch_size=4)
    for name in "abcd":
        paper.add(name, steps=2)
    while not paper.moves():
        paper.unit()
    paper.turns.shrink(SMALL, 2)
    paper.run()
    assert [len(names) for _, names in paper.moves()] == [4, 2, 2]
    for name in "efgh":
        paper.add(name, steps=1)
    paper.run()
    assert len(paper.moves()[-1][1]) == 4


@pytest.mark.parametrize("size", [0, -1])
def test_an_engine_without_seats_is_a_mistake(size):
    with pytest.raises(ValueError, match="at least 1"):
        Turns(size)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_and_goes_every_picture_is_painted_once_after_exactly_its_steps(seed):
    choice = random.Random(seed)
    paper = Paper(max_batch_size=choice.randint(1, 5))
    wanted: dict[str, tuple[int, int]] = {}
    dropped: set[str] = set()
    for number in range(60):
        name = f"r{number}"
        n, steps = choice.randint(1, 4), choice.randint(1, 6)
        paper.add(name, choice.choice([SMALL, LARGE, WIDE]), n=n, steps=steps, priority=choice.choice([-1, 0, 0, 5]))
        wanted[name] = (n, steps)
        for _ in range(choice.randint(0, 8)):
            paper.unit()
        if choice.random() < 0.2:
            victim = choice.choice(list(wanted))
            paper.turns.drop(victim)
            dropped.add(victim)
    paper.run()
    painted = Counter(entry[1] for entry in paper.log if entry[0] == "paint")
    moved = Counter(name for _, names in paper.moves() for name in names)
    for name, (n, steps) in wanted.items():
        if name not in dropped:
            assert (painted[name], moved[name]) == (n, n * steps)
        assert painted[name] <= n
    # No step mixed sizes or took more than the seats; nobody moved before it was prepared.
    assert all(len(names) <= paper.turns.max_batch_size for _, names in paper.moves())
    assert not paper.turns.has_work


def test_waiting_is_bounded_by_those_before_and_the_number_of_sizes():
    # Given three sizes, each with requests in every seat that are followed by ever new ones of their own,
    paper = Paper(max_batch_size=2)
    for group in (SMALL, LARGE, WIDE):
        for number in range(6):
            paper.add(f"{group.height}x{group.width}-{number}", group, steps=4)
    # when one more comes, then it is done after the pictures before it, at two a time, and a third of the moves.
    paper.add("me", SMALL, steps=4)
    while ("paint", "me") not in paper.log:
        paper.add(f"later-{len(paper.log)}", LARGE, steps=4)
        paper.unit()
    assert len(paper.moves()) <= 3 * 4 * (6 // 2 + 1) + 3
