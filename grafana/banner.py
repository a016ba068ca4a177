"""What is readable from across a room, all of one run, the one in the worst state: counts, where, since when."""

from __future__ import annotations

from grafana import queries as q
from grafana.panels import (
    ALARM,
    AMBER,
    CALM,
    CRITICAL,
    GREY,
    ORANGE,
    RED,
    RUN,
    STATE_WORDS,
    WARNING,
    Panel,
    Placed,
    column,
    now,
    number,
)

NOT_MEASURED = "not measured"
TIER_WORDS = {"0": ("calm", "transparent")} | {str(count): ("WARNING", AMBER) for count in range(WARNING, CRITICAL)}


def panels() -> list[Placed]:
    """Return the panels with their places."""
    return [
        Placed(_state(), 0, 0, 6, 9),
        Placed(_count("NaN", "NaN does not recover once a step was taken with it."), 6, 0, 4, 6),
        Placed(_tier("NaN"), 6, 6, 4, 3),
        Placed(_count("Inf", "Inf can recover: see whether the next checks are clean."), 10, 0, 4, 6),
        Placed(_tier("Inf"), 10, 6, 4, 3),
        Placed(_first_bad_layer(), 14, 0, 6, 6),
        Placed(_since(), 14, 6, 6, 3),
        Placed(_last_check(), 20, 0, 4, 3),
        Placed(_unmeasured(), 20, 3, 4, 3),
        Placed(_alerts(), 20, 6, 4, 3),
    ]


def _state() -> Panel:
    return number(
        "State",
        "The worst state among the chosen runs, and which run is in it; the tiles beside it show that run. HEALTHY: "
        "checks were made in the last 5 minutes, none was bad. WARNING: one check found 1 to 5 Inf or NaN. CRITICAL: "
        "more than 5. NOT MEASURING: no check for 5 minutes, or none ever, or layers that could not be measured. GONE: "
        "listed but not answering, and its run was not reported as ended. ENDED: it was. DRILL: only a made-up value "
        "is bad. Normal is HEALTHY. Needs the recording rules of alerts/rules.yml.",
        now(q.headline_state(), RUN),
        words=STATE_WORDS,
        no_value="NO DATA",
        fill=True,
        name=True,
        steps=((None, GREY),),
    )


def _count(kind: str, then: str) -> Panel:
    return number(
        kind,
        f"{kind} elements in the worst single check of the last 5 minutes of the run in the worst state: the number "
        "that the page is about. Normal is 0, which is shown only where checks were made and every layer was measured. "
        f"From 1 it is amber, from 6 red. {then}",
        now(q.headline_count(kind.lower())),
        steps=((None, GREY), (0, CALM), (WARNING, ORANGE), (CRITICAL, RED)),
        unit="locale",
        no_value=NOT_MEASURED,
    )


def _tier(kind: str) -> Panel:
    return number(
        f"{kind} tier",
        f"The tier of the {kind} count above: calm at 0, WARNING on amber from 1 to 5, CRITICAL on red from 6. Normal "
        "is calm. A separate tile, because Grafana colours either the text or the background of a tile.",
        now(q.headline_count(kind.lower())),
        unit="prefix:CRITICAL ",
        words=TIER_WORDS,
        fill=True,
        steps=((None, "transparent"), (WARNING, AMBER), (CRITICAL, ALARM)),
        no_value=NOT_MEASURED,
    )


def _first_bad_layer() -> Panel:
    return number(
        "First bad layer, last bad check",
        "The bad layer nearest the loss in the most recent bad check of this run: where it began, and how long ago "
        "that was. Normal is none.",
        now(q.headline_origin(), "{{layer}} {{kind}}"),
        unit="dateTimeFromNow",
        words={"0": ("so far", CALM)},
        steps=((None, GREY), (0, CALM), (1, RED)),
        name=True,
        size=28,
    )


def _since() -> Panel:
    return number(
        "In trouble since",
        "Start of the oldest alert on this run that is still firing: Inf, NaN, gone, or not measuring. Normal is none.",
        now(q.headline_since()),
        unit="dateTimeFromNow",
        words={"0": ("not now", CALM)},
        steps=((None, GREY), (0, CALM), (1, RED)),
        size=28,
    )


def _last_check() -> Panel:
    return number(
        "Since the last check",
        "Time since this run's gradients were last checked, by the trainer's clock. Normal is a few seconds, or one "
        "training step; without recent checks a count of 0 means nothing. A run that ended shows none.",
        now(q.headline_unchecked_seconds()),
        unit="s",
        words={"null+nan": ("never", GREY)},
        steps=((None, GREY), (0, CALM), (120, ORANGE)),
    ).decimals(0)


def _unmeasured() -> Panel:
    return number(
        "Layers not measured",
        "Layers of this run whose gradient could not be measured in the last 5 minutes. "
        "Normal is 0; otherwise a count of 0 does not cover them.",
        now(q.headline_unmeasured()),
        steps=((None, GREY), (0, CALM), (1, ORANGE)),
        no_value=NOT_MEASURED,
    )


def _alerts() -> Panel:
    panel = number(
        "Alerts firing",
        "Alerts on all chosen instances, without the watchdog: critical ones page, warnings go to chat. Normal is 0 "
        "for both; the row below names them.",
        now(q.firing_count("critical"), "critical", "A"),
        now(q.firing_count("warning"), "warning", "B"),
        steps=((None, GREY), (0, CALM), (1, ORANGE)),
        name=True,
        size=18,
    )
    return column(panel, "critical", steps=((None, GREY), (0, CALM), (1, RED)))
