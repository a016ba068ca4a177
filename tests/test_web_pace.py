"""Turns: how much of a core is taken, who waits for whom, and who is next."""

import asyncio
import time

import pytest

from esper_telemetry.exporters.web import pace
from esper_telemetry.exporters.web.pace import BURST_SECONDS, Pace, Turns


async def exhausted(last_first=False, rest=0.05):
    """Return turns of which so much were taken that the next one is that long away."""
    costs = iter([BURST_SECONDS + rest])
    turns = Turns(1.0, lambda: next(costs, 0.0), last_first)
    turns.charge()
    return turns


async def take(turns, had, name, address=""):
    await turns.next(address)
    had.append(name)


def test_who_floods_gets_its_share_and_not_more():
    async def flood(turns):
        used, began = time.thread_time(), time.monotonic()
        while time.monotonic() - began < 1:
            await turns.next()
            work(0.002)
            turns.charge()
        return time.thread_time() - used

    assert asyncio.run(flood(Pace().others)) < 3 * BURST_SECONDS  # of a second


def test_a_share_that_waking_up_alone_uses_has_its_turn_all_the_same():
    async def ask():
        turns = Turns(0.5, lambda: 0.01)  # whatever the thread does, it costs twenty times what a rest earns
        turns._paid_until = time.monotonic() + 2 * BURST_SECONDS + 0.05
        for _ in range(3):
            await asyncio.wait_for(turns.next(), 60)

    asyncio.run(ask())


def test_nobody_waits_as_long_as_little_is_asked():
    async def ask():
        turns = Pace().regulars
        for _ in range(1000):
            with pytest.raises(StopIteration):  # it does not even give way to others
                turns.next().send(None)
            turns.charge()
        return turns.strained

    assert asyncio.run(ask()) is False


def test_no_kind_waits_for_another():
    async def ask():
        kinds = Pace()
        kinds.others._paid_until = time.monotonic() + 1000
        stuck = asyncio.create_task(kinds.others.next())
        await asyncio.sleep(0)
        for turns in (kinds.door, kinds.newcomers, kinds.regulars):
            await turns.next()
        assert kinds.strained
        assert not stuck.done()
        stuck.cancel()

    asyncio.run(ask())


@pytest.mark.parametrize(("last_first", "order"), [(False, "abcdef"), (True, "fbeadc")])
def test_turns_are_had_in_the_order_of_arrival_but_of_newcomers_the_last_or_one_of_the_last_is_next(last_first, order):
    async def ask():
        turns, had = await exhausted(last_first), []
        await asyncio.gather(*(take(turns, had, name) for name in "abcdef"))
        assert "".join(had) == order

    asyncio.run(ask())


@pytest.mark.parametrize(("last_first", "order"), [(False, "axbyczd"), (True, "zcyaxbd")])
def test_a_flood_from_one_address_does_not_keep_another_waiting(last_first, order):
    async def ask():
        turns, had = await exhausted(last_first), []
        flood = (take(turns, had, name, "192.0.2.1") for name in "abcd")
        await asyncio.gather(*flood, *(take(turns, had, name, "192.0.2.2") for name in "xyz"))
        return "".join(had)

    assert asyncio.run(ask()) == order


def test_no_newcomer_is_overtaken_for_ever_by_those_that_come_again_and_again():
    turns = Turns(1.0, lambda: 0.0, last_first=True)
    turns._waiting = dict.fromkeys([*range(50), "patient"], "")
    turns._waiting[49] = turns._waiting.pop(49)  # has come again already
    had = []
    while "patient" not in had:
        assert len(had) < 10
        had.append(turns._choose())
        turns._waiting[had[-1]] = turns._waiting.pop(had[-1])


def test_of_all_kinds_only_newcomers_overtake_each_other():
    kinds = Pace()
    assert kinds.newcomers._last_first
    assert not any(turns._last_first for turns in (kinds.door, kinds.regulars, kinds.others))


def test_who_comes_while_others_wait_does_not_overtake_them():
    async def ask():
        turns, had = await exhausted(), []
        waiting = [asyncio.create_task(take(turns, had, name)) for name in "ab"]
        await asyncio.sleep(0)
        turns._paid_until = 0.0  # there is time again, and those who wait were not told yet
        await take(turns, had, "c")
        await asyncio.gather(*waiting)
        assert had == ["a", "b", "c"]

    asyncio.run(ask())


def test_who_gives_up_takes_nobody_elses_turn():
    async def ask():
        turns = await exhausted()
        impatient = asyncio.create_task(turns.next())
        patient = asyncio.create_task(turns.next())
        await asyncio.sleep(0)
        impatient.cancel()
        await asyncio.wait_for(patient, 30)
        assert impatient.cancelled()
        await asyncio.wait_for(turns.next(), 30)

    asyncio.run(ask())


def test_a_pause_as_long_as_a_garbage_collection_is_not_paid_for_by_those_who_ask():
    turns = Pace().regulars
    turns.charge()
    work(2 * BURST_SECONDS)
    turns.charge()
    assert turns._paid_until - time.monotonic() <= pace._LONGEST_TURN / pace.REGULARS_SHARE


def work(seconds):
    started = time.thread_time()
    while time.thread_time() - started < seconds:
        pass
