"""What is readable from across a room: state, counts, the first bad layer, the last check."""

from __future__ import annotations

from grafana import queries as q
from grafana.panels import ALARM, CALM, CRITICAL, GREY, ORANGE, RED, STATE_WORDS, WARNING, Panel, Placed, now, number
from grafana.queries import latest

NOT_MEASURED = "not measured"
TIER_WORDS = {"0": ("calm", "transparent")} | {str(count): ("WARNING", "transparent") for count in range(1, CRITICAL)}


def panels() -> list[Placed]:
    """Return the panels with their places."""
    return [
        Placed(_state(), 0, 0, 6, 8),
        Placed(_count("NaN", "NaN does not recover once a step was taken with it."), 6, 0, 4, 5),
        Placed(_tier("NaN"), 6, 5, 4, 3),
        Placed(_count("Inf", "Inf can recover: see whether the next checks are clean."), 10, 0, 4, 5),
        Placed(_tier("Inf"), 10, 5, 4, 3),
        Placed(_first_bad_layer(), 14, 0, 6, 5),
        Placed(_bad_since(), 14, 5, 6, 3),
        Placed(_last_check(), 20, 0, 4, 5),
        Placed(_alerts(), 20, 5, 4, 3),
    ]


def _state() -> Panel:
    return number(
        "State",
        "The worst state among the chosen instances. HEALTHY: checks were made in the last 5 minutes, none was bad. "
        "WARNING: one check found 1 to 5 Inf or NaN. CRITICAL: more than 5. NOT MEASURING: no check for 5 minutes, or "
        "none ever. GONE: listed, and does not answer, and never said that its run ended. ENDED: it did say so. "
        "DRILL: only a made-up value is bad. Normal is HEALTHY. Needs the recording rules of alerts/rules.yml.",
        now(f"max({q.state()})"),
        words=STATE_WORDS,
        no_value="NO DATA",
        fill=True,
        steps=((None, GREY),),
    )


def _count(kind: str, then: str) -> Panel:
    return number(
        kind,
        f"{kind} elements in the worst single check of the last 5 minutes, of the worst instance: the number that "
        "the page is about. Normal is 0, which is shown only where checks were made. From 1 it is red; above 5 it is "
        f"critical, and so is the tile below. {then}",
        now(q.worst_count(kind.lower())),
        steps=((None, GREY), (0, CALM), (WARNING, RED)),
        unit="locale",
        no_value=NOT_MEASURED,
    )


def _tier(kind: str) -> Panel:
    return number(
        f"{kind} tier",
        f"The tier of the {kind} count above: calm at 0, WARNING from 1 to 5, and on red from 6. Normal is calm. A "
        "tile of its own, since Grafana colours either the text or the background of a tile.",
        now(q.worst_count(kind.lower())),
        unit="prefix:CRITICAL ",
        words=TIER_WORDS,
        fill=True,
        steps=((None, "transparent"), (CRITICAL, ALARM)),
        no_value=NOT_MEASURED,
    )


def _first_bad_layer() -> Panel:
    return number(
        "First bad layer, last bad check",
        "The layer nearest the loss that was bad in the most recent bad check: where it began, and how long ago that "
        "was. Normal is none.",
        now(q.origin(), "{{layer}} {{kind}}"),
        unit="dateTimeFromNow",
        words={"0": ("so far", CALM)},
        steps=((None, GREY), (0, CALM), (1, RED)),
        name=True,
        size=28,
    )


def _bad_since() -> Panel:
    return number(
        "Bad since",
        "When the oldest alert on Inf or NaN that is still on began. Normal is none.",
        now(q.bad_since()),
        unit="dateTimeFromNow",
        words={"0": ("not now", CALM)},
        steps=((None, GREY), (0, CALM), (1, RED)),
        size=28,
    )


def _last_check() -> Panel:
    return number(
        "Since the last check",
        "Time since gradients were last looked at, of the instance that waits longest and has not ended, by the "
        "trainer's clock. Normal is a few seconds, or one training step; a count of 0 means nothing without it.",
        now(q.unchecked_seconds()),
        unit="s",
        words={"null+nan": ("never", GREY)},
        steps=((None, GREY), (0, CALM), (120, ORANGE)),
    ).decimals(0)


def _alerts() -> Panel:
    return number(
        "Alerts firing",
        "Alerts on the chosen instances, the watchdog left out. Normal is 0; the row below names them.",
        now(f"count({q.firing()}) or 0 * max({latest('esper_run_info')})"),
        steps=((None, GREY), (0, CALM), (1, RED)),
    )
