"""What the rows of all ranks say together, whenever and in whatever order they come."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_telemetry.ranks.board import HOLD_SECONDS, SILENT_SECONDS, Board
from esper_telemetry.ranks.row import KEPT, BadCheck, ModelState, Row
from esper_telemetry.snapshot.damage import PARTS, Damage, GoodCheck
from esper_telemetry.snapshot.rank_share import GradScope
from esper_telemetry.snapshot.ranks import RankPlace, worst_of
from tests.snapshots import bad, damaged, fresh

WINDOW = 120.0
UNSEEN = ModelState()


def check(number, *, nan=0, inf=0, own_nan=None, local=None, layer="net.0", at=0.0):
    """Return a bad check; what a rank owns is all that it sees, and what it made likewise, unless told."""
    own, made = nan if own_nan is None else own_nan, nan if local is None else local
    return BadCheck(number, inf, nan, inf, own, 0, made, layer, at)


def row(rank, *checks, beat=1, ended=False, attributes=True, host=None, process=4711, state=UNSEEN):
    place = RankPlace(rank, rank % 8, host or f"host{rank // 8}", None)
    return Row(place, process, beat, ended, attributes, checks, state)


def counts(board, now=0.0):
    recent = board.read(now).recent.read(now)
    return recent.inf_max, recent.nan_max


def test_seven_that_are_split_into_four_and_three_are_seven():
    board = Board(2, WINDOW)
    board.take(row(0, check(40, nan=4)), 0.0)
    assert counts(board) == (0, 4)
    board.take(row(1, check(40, nan=3)), 0.1)
    assert counts(board) == (0, 7)


def test_checks_of_other_numbers_are_not_added():
    board = Board(2, WINDOW)
    board.take(row(0, check(40, nan=4)), 0.0)
    board.take(row(1, check(41, nan=3)), 0.0)
    assert counts(board) == (0, 4)


def test_what_every_replica_sees_counts_once():
    board = Board(3, WINDOW)
    board.take(row(2, check(40, nan=7, own_nan=0, local=0)), 0.0)
    assert counts(board, HOLD_SECONDS) == (0, 7), "whoever owns them has not been heard yet, and they are there"
    board.take(row(0, check(40, nan=7, local=0)), HOLD_SECONDS)
    board.take(row(1, check(40, nan=7, own_nan=0, local=7)), HOLD_SECONDS)
    assert counts(board, HOLD_SECONDS) == (0, 7)


def test_a_check_is_told_with_the_rank_that_made_it_bad_or_when_that_one_is_waited_for_no_more():
    board = Board(3, WINDOW)
    board.take(row(0, check(40, nan=7, local=0)), 0.0)
    assert counts(board, HOLD_SECONDS / 2) == (0, 0), "a page now would blame nobody"
    board.take(row(1, check(40, nan=7, own_nan=0, local=7)), HOLD_SECONDS / 2)
    assert counts(board, HOLD_SECONDS / 2) == (0, 7)
    board.take(row(0, check(41, nan=9, local=0), beat=2), 1.0)
    board.take(row(1, check(41, nan=9, own_nan=0, local=0), beat=2), 1.0)
    board.take(row(2, check(41, nan=9, own_nan=0, local=0), beat=2), 1.0)
    assert counts(board, 1.0) == (0, 9), "nobody is at fault: all have said so"


def test_a_check_waits_for_nobody_when_all_ranks_have_ended():
    board = Board(2, WINDOW)
    board.take(row(0), 0.0)
    board.take(row(1, check(40, nan=7, local=0), ended=True), 0.0)
    assert counts(board) == (0, 0)
    board.take(row(0, ended=True), 0.0)
    assert counts(board) == (0, 7), "nobody reads the rows any more"


def test_no_check_is_lost_while_it_waits():
    board = Board(2, WINDOW)
    board.take(row(0, check(1, nan=9, local=0)), 0.0)
    for number in range(2, 80):
        board.take(row(0, check(number, nan=1, local=0), beat=number), 0.0)
    assert counts(board, 0.0) == (0, 9)


def test_where_a_rank_does_not_know_what_it_owns_the_worst_rank_stands_and_the_count_is_not_exact():
    board = Board(2, WINDOW)
    unknown = check(40, nan=7)._replace(own_inf=None, own_nan=None)
    for rank in (0, 1):
        board.take(row(rank, unknown), 0.0)
    assert counts(board) == (0, 7)
    assert not board.read(1.0).exact
    assert board.read(WINDOW + 1).exact


@st.composite
def runs(draw):
    """Draw what ranks find at each check, and their rows in an order in which they may arrive."""
    ranks = draw(st.integers(1, 4))
    found = [
        draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=KEPT, min_size=0)) for _ in range(ranks)
    ]
    rows = []
    for rank, checks in enumerate(found):
        bad_checks = [
            BadCheck(number, inf, nan, inf, nan, inf, nan, "l", 0.0)
            for number, (inf, nan) in enumerate(checks, start=1)
            if inf or nan
        ]
        written = draw(st.lists(st.integers(0, len(bad_checks)), max_size=3))
        ends = [*sorted(written), len(bad_checks)]
        rows.append([row(rank, *bad_checks[:end][-KEPT:], beat=beat) for beat, end in enumerate(ends, start=1)])
    order = draw(st.permutations([rank for rank, of_rank in enumerate(rows) for _ in of_rank]))
    return found, [rows[rank].pop(0) for rank in order]


@given(runs())
def test_the_sum_is_that_of_each_check_in_whatever_order_rows_arrive(run):
    found, arriving = run
    board = Board(len(found), WINDOW)
    for each in arriving:
        board.take(each, 0.0)
    numbers = range(1 + max((len(checks) for checks in found), default=0))
    sums = [
        tuple(sum(checks[number][kind] for checks in found if number < len(checks)) for kind in (0, 1))
        for number in numbers
    ]
    assert counts(board) == tuple(map(max, zip(*sums, strict=True)))


def test_the_rank_that_was_bad_first_comes_first_and_the_worst_five_are_named():
    board = Board(8, WINDOW)
    for rank in range(1, 8):
        board.take(row(rank, check(40, nan=rank, at=100.0 - rank)), 0.0)
    board.take(row(0, check(39, nan=1, at=200.0)), 0.0)
    bad_ranks = board.read(0.0).bad_at(0.0)
    assert [each.rank for each in bad_ranks] == [0, 7, 6, 5, 4, 3, 2, 1]
    assert [(place, each.rank) for place, each in worst_of(bad_ranks)] == [(2, 7), (3, 6), (4, 5), (5, 4), (6, 3)]


def test_a_rank_is_bad_for_the_recent_window_with_the_layer_of_its_first_bad_check():
    board = Board(2, WINDOW)
    board.take(row(1, check(40, nan=2, layer="first")), 0.0)
    board.take(row(1, check(40, nan=2, layer="first"), check(41, nan=9, layer="second"), beat=2), 100.0)
    (bad_rank,) = board.read(101.0).bad_at(101.0)
    assert (bad_rank.layer, bad_rank.nan_count, bad_rank.check) == ("first", 9, 40)
    assert board.read(101.0).bad_at(100.0 + WINDOW + 1) == ()
    assert board.read(100.0 + WINDOW + 1).bad == ()


def test_no_rank_is_at_fault_only_where_every_rank_measures_it():
    board = Board(2, WINDOW)
    board.take(row(0, check(40, inf=543, local=0)), 0.0)
    assert board.read(0.0).bad_at(0.0) == ()
    board.take(row(1, attributes=False), 0.0)
    assert board.read(0.0).bad_at(0.0) is None


def test_who_goes_silent_is_gone_and_who_has_ended_is_not():
    board = Board(4, WINDOW)
    for rank in (0, 1, 2):
        board.take(row(rank, ended=rank == 1), 0.0)
    ranks = board.read(0.0)
    assert (ranks.expected, ranks.reporting, ranks.gone, ranks.silent) == (4, 3, 0, (3,))
    later = SILENT_SECONDS + 1
    board.take(row(0, beat=2), later)
    ranks = board.read(later)
    assert (ranks.reporting, ranks.gone, ranks.silent) == (2, 1, (2, 3))


def test_another_process_in_a_rank_s_place_counts_from_1_again():
    board = Board(1, WINDOW)
    board.take(row(0, check(500, nan=1), beat=90), 0.0)
    board.take(row(0, check(3, nan=9), process=4712), 1.0)
    assert counts(board, 1.0) == (0, 9)


def test_a_rank_that_has_lost_its_connection_and_found_it_again_is_counted_once():
    board = Board(2, WINDOW)
    board.take(row(1, check(40, nan=4), beat=90), 0.0)
    board.take(row(1, check(40, nan=4)), 1.0)
    assert counts(board, 1.0) == (0, 4)


def test_a_row_survives_its_way():
    sent = row(3, check(40, nan=7, layer='a"b\n№', at=1.5), beat=7, ended=True, host="gpu-7")
    assert Row.decode(sent.encode()) == sent


@pytest.mark.parametrize("text", [b"", b"[]", b"[1,2,3,4,5,6]", b"{}"])
def test_what_is_no_row_says_so(text):
    with pytest.raises((ValueError, TypeError)):
        Row.decode(text)


def test_a_good_check_has_nothing_to_tell():
    assert BadCheck.of(fresh()) is None


def test_a_bad_check_tells_what_the_snapshot_says():
    told = BadCheck.of(replace(bad(2, 7), owned_inf_count=1, owned_nan_count=4))
    assert (told.check, told.inf, told.nan, told.own_inf, told.own_nan) == (40, 2, 7, 1, 4)
    assert (told.local_inf, told.local_nan, told.layer) == (2, 7, "policy.weight")


def test_what_was_not_measured_is_not_told_as_0():
    told = BadCheck.of(replace(bad(2, 7), local=None, scope=GradScope("local", False, "update")))
    assert (told.own_inf, told.own_nan, told.local_inf, told.local_nan) == (None, None, None, None)


WELL = ModelState("intact")


def damaged_state(part="parameters", elements=3, tensor="w", last_good=(39, 9.0)):
    return ModelState(part, elements, tensor, None, False, last_good)


def test_a_model_is_as_damaged_as_its_worst_rank_whoever_reads_it():
    board = Board(3, WINDOW)
    assert (board.read(0.0).damage, board.read(0.0).damaged) == (None, ())
    board.take(row(0), 0.0)
    assert board.read(0.0).damage is None, "nobody has looked"
    board.take(row(1, state=WELL), 0.0)
    assert board.read(0.0).damage == "intact"
    board.take(row(2, state=damaged_state("optimizer", 9)), 0.0)
    board.take(row(1, beat=2, state=damaged_state("parameters", 2)), 0.0)
    read = board.read(0.0)
    assert (read.damage, [rank.rank for rank in read.damaged]) == ("parameters", [1, 2])
    board.take(row(1, beat=3, state=WELL), 0.0)
    assert board.read(0.0).damage == "optimizer"
    board.take(row(2, process=4712, state=WELL), 0.0)
    assert (board.read(0.0).damage, board.read(0.0).damaged) == ("intact", ())


@given(st.lists(st.tuples(st.sampled_from([None, "intact", *PARTS]), st.one_of(st.none(), st.integers(1, 99)))))
def test_the_run_is_good_where_all_are_and_else_goes_back_to_before_the_first_that_was_not(ranks):
    board = Board(len(ranks), WINDOW)
    for rank, (damage, last) in enumerate(ranks):
        good = last is None and rank % 2 == 0
        state = ModelState(damage, 1, "w", None, good, None if good or last is None else (last, float(last)))
        board.take(row(rank, state=state), 0.0)
    read, own = board.read(0.0), GoodCheck(100, 100.0, 7)
    bad_ranks = [last for rank, (_, last) in enumerate(ranks) if last is not None or rank % 2]
    if not bad_ranks:
        assert read.last_good_check(own) is own
    elif None in bad_ranks:
        assert read.last_good_check(own) is None, "one of them never was good"
    else:
        assert read.last_good_check(own).check == min(bad_ranks)
    words = [damage for damage, _ in ranks if damage is not None]
    worst = next((part for part in PARTS if part in words), "intact" if words else None)
    assert read.damage == worst
    assert len(read.damaged) == sum(word != "intact" for word in words)


def test_a_rank_at_fault_is_told_with_where_its_trouble_began():
    board = Board(2, WINDOW)
    board.take(row(1, check(40, nan=7)), 0.0)
    assert board.read(0.0).bad[0].cause is None
    board.take(row(1, check(40, nan=7), beat=2, state=WELL._replace(cause="input")), 1.0)
    assert board.read(1.0).bad[0].cause == "input", "the trap is set after the first bad check"


def test_a_state_says_what_is_damaged_and_since_when_it_is_not_good():
    assert ModelState.of(fresh()) == ModelState()
    well = replace(fresh(), checks=40, found_damage=Damage(), last_good_check=GoodCheck(40, 9.0, None))
    assert ModelState.of(well) == WELL
    assert ModelState.of(replace(well, checks=41)) == ModelState("intact", good=False, last_good=(40, 9.0))
    assert ModelState.of(replace(fresh(), checks=1)) == ModelState(good=False)
    state = ModelState.of(damaged())
    assert (state.damage, state.elements, state.tensor) == ("parameters", 3, "policy.weight")


def test_a_row_with_a_state_survives_the_store():
    read = Row.decode(row(1, state=damaged_state()).encode())
    assert read.state._replace(last_good=tuple(read.state.last_good)) == damaged_state()
