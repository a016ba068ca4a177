"""Passwords: who is let in, and how much work anybody can make us do."""

import asyncio
import time

import bcrypt
import pytest

from esper_telemetry.exporters.web import auth
from esper_telemetry.exporters.web.auth import BasicAuth, CheckWorker, Verdict
from tests.certificates import SECRET_HASH, basic

USERS = {"prometheus": SECRET_HASH, "jürgen": bcrypt.hashpw("größer".encode(), bcrypt.gensalt(4)).decode()}


@pytest.fixture
def checks(monkeypatch):
    """Return the hashes that passwords were really checked against."""
    checked = []

    def count(password, hashed, check=bcrypt.checkpw):
        checked.append(hashed.decode())
        return check(password, hashed)

    monkeypatch.setattr(auth.bcrypt, "checkpw", count)
    return checked


def judge(*headers, users=USERS):
    async def run():
        judged = BasicAuth(users, CheckWorker())
        return [await judged.judge(header, "10.0.0.1") for header in headers]

    return asyncio.run(run())


def credentials(user, password):
    return basic(user, password)["Authorization"]


@pytest.mark.parametrize(
    ("user", "password", "verdict"),
    [
        ("prometheus", "secret", Verdict.WELCOME),
        ("jürgen", "größer", Verdict.WELCOME),
        ("prometheus", "größer", Verdict.UNKNOWN),
        ("prometheus", "", Verdict.UNKNOWN),
        ("prometheus", "secret\0", Verdict.UNKNOWN),
        ("prometheus", "x" * 10_000, Verdict.UNKNOWN),
        ("nobody", "secret", Verdict.UNKNOWN),
        ("", "", Verdict.UNKNOWN),
    ],
)
def test_who_is_let_in(user, password, verdict):
    assert judge(credentials(user, password)) == [verdict]


@pytest.mark.parametrize("header", ["", "Basic", "Basic !", "Basic bm9jb2xvbg==", "Bearer c2VjcmV0", "Basic \xff"])
def test_what_is_no_password_is_refused_without_work(checks, header):
    assert judge(header) == [Verdict.UNKNOWN]
    assert checks == []


def test_a_password_of_more_than_72_bytes_counts_as_bcrypt_counts_it():
    hashed = bcrypt.hashpw(b"x" * 72, bcrypt.gensalt(4)).decode()
    assert judge(credentials("joe", "x" * 80), users={"joe": hashed}) == [Verdict.WELCOME]


def test_a_right_password_is_checked_once_and_a_wrong_one_each_time(checks):
    right, wrong = credentials("prometheus", "secret"), credentials("prometheus", "wrong")
    assert judge(right, right, wrong, right, wrong) == [
        *(Verdict.WELCOME, Verdict.WELCOME, Verdict.UNKNOWN, Verdict.WELCOME, Verdict.UNKNOWN)
    ]
    assert checks == [SECRET_HASH] * 3


def test_an_unknown_user_costs_as_much_as_the_dearest_hash(checks):
    dear = bcrypt.hashpw(b"x", bcrypt.gensalt(6)).decode()
    judge(credentials("nobody", "x"), users={"a": SECRET_HASH, "b": dear, "c": SECRET_HASH})
    assert checks == [dear]


def test_a_flood_is_refused_after_one_check_at_a_time_and_locks_out_no_other_client(checks):
    async def run():
        judged = BasicAuth(USERS, CheckWorker())
        flood = [judged.judge(credentials("prometheus", f"wrong {guess}"), "10.0.0.66") for guess in range(500)]
        return await asyncio.gather(*flood, judged.judge(credentials("prometheus", "secret"), "10.0.0.1"))

    *flood, good = asyncio.run(run())
    assert good is Verdict.WELCOME
    assert flood.count(Verdict.BUSY) == 499
    assert len(checks) == 2


def test_floods_from_everywhere_are_bounded():
    async def run():
        judged = BasicAuth(USERS, CheckWorker())
        return await asyncio.gather(
            *(judged.judge(credentials("prometheus", "wrong"), f"10.0.0.{host}") for host in range(100))
        )

    assert asyncio.run(run()).count(Verdict.BUSY) == 100 - auth.MAX_WAITING


def test_a_client_that_goes_away_frees_its_place_only_when_its_check_has_ended(checks):
    async def run():
        judged = BasicAuth(USERS, CheckWorker())
        gone = asyncio.create_task(judged.judge(credentials("prometheus", "wrong"), "10.0.0.66"))
        await asyncio.sleep(0)
        gone.cancel()
        return await judged.judge(credentials("prometheus", "wrong"), "10.0.0.66")

    assert asyncio.run(run()) is Verdict.BUSY


def test_after_a_burst_checks_rest_so_long_that_they_keep_to_their_share(monkeypatch):
    monkeypatch.setattr(auth, "_timed_check", lambda password, hashed: (False, 0.004))
    monkeypatch.setattr(auth, "_BURST_SECONDS", 0.0)

    async def run():
        worker = CheckWorker()
        for _ in range(3):
            await worker.check(b"wrong", b"", "10.0.0.66")

    started = time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - started >= 2 * 0.004 / auth.SHARE
