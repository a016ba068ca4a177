import socket
from contextlib import ExitStack, closing
from selectors import EVENT_READ
from time import thread_time

import pytest

from esper_telemetry.exporters.web.pace import BURST_SECONDS, PacedSelector

CLIENTS = 40


@pytest.fixture
def busy():
    """Return a selector whose burst is used up, and the file descriptors of clients that all want something."""
    with ExitStack() as open_ones:
        pace = open_ones.enter_context(closing(PacedSelector()))
        numbers = []
        for _ in range(CLIENTS):
            server, client = (open_ones.enter_context(closing(each)) for each in socket.socketpair())
            client.send(b"x")
            pace.register(server, EVENT_READ)
            numbers.append(server.fileno())
        while pace.select(0):
            work(0.005)
        yield pace, numbers


def work(seconds):
    started = thread_time()
    while thread_time() - started < seconds:
        pass


def served(pace):
    return [key.fd for key, _ in pace.select()]


def test_who_is_known_has_a_turn_before_strangers_do(busy):
    pace, numbers = busy
    pace.known.add(numbers[-1])
    assert all(numbers[-1] in served(pace) for _ in range(3))


def test_strangers_have_a_turn_however_many_are_known(busy):
    pace, numbers = busy
    pace.known.update(numbers[1:])
    assert numbers[0] in served(pace)


def test_while_known_ones_wait_strangers_have_a_quarter_of_the_time(busy):
    pace, numbers = busy
    pace.known.update(numbers[1:])
    spent = dict.fromkeys((True, False), 0.0)
    for _ in range(40):
        with_stranger = numbers[0] in served(pace)
        started = thread_time()
        work(0.001)
        spent[with_stranger] += thread_time() - started
    assert 0.15 < spent[True] / sum(spent.values()) < 0.3


def test_those_who_always_ask_have_their_turns_in_a_circle(busy):
    pace, numbers = busy
    turns = [number for _ in range(40) for number in served(pace)]
    assert set(turns[:CLIENTS]) == set(numbers)
    assert turns[CLIENTS:] == turns[:-CLIENTS]


def test_a_pause_as_long_as_a_garbage_collection_is_not_paid_for_by_those_who_ask():
    with closing(PacedSelector()) as pace:
        pace.select(0)
        work(2 * BURST_SECONDS)
        pace.select(0)
        assert not pace.strained


def test_a_selector_that_is_not_busy_neither_rests_nor_holds_back():
    with closing(PacedSelector()) as pace, ExitStack() as open_ones:
        for _ in range(3):
            server, client = (open_ones.enter_context(closing(each)) for each in socket.socketpair())
            client.send(b"x")
            pace.register(server, EVENT_READ)
        assert all(len(served(pace)) == 3 for _ in range(1000))
        assert not pace.strained
