"""A recording as one HTML page that needs nothing else: no script, no font, no picture from anywhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files

from esper_telemetry.health import HealthTier
from esper_telemetry.recorder.recording import Recording
from esper_telemetry.recorder.report.numbers import elements, facts, number, rates, trails
from esper_telemetry.recorder.report.plot import line_plot

_LAST_CHECKS = 16


def report_page(recording: Recording) -> str:
    """Return the page."""
    style = files("esper_telemetry.recorder.report").joinpath("page.css").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    title = f"check {recording.check} of {recording.run_id}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'sha256-{digest}'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        f"{_headline(recording)}\n{_origin(recording)}\n{_facts(facts(recording))}\n"
        f"{_layers(recording)}\n{_plots(recording)}\n{_last_checks(recording)}\n"
        "</main>\n</body>\n</html>\n"
    )


def _headline(recording: Recording) -> str:
    counts = ("NaN", recording.nan_count), ("Inf", recording.inf_count)
    shown = "".join(
        f'<span class="{HealthTier.of(count).value}">{name}:{count:,}</span> ' for name, count in counts if count
    )
    return f"<h1>{shown}at check {recording.check}</h1>"


def _origin(recording: Recording) -> str:
    steps = (
        ("the loss", "edge"),
        (recording.clean_before, "clean"),
        (recording.origin_layer, "origin"),
        (recording.clean_after, "clean"),
        ("the input", "edge"),
    )
    listed = "".join(f'<li><span class="{kind}">{escape(name)}</span></li>' for name, kind in steps if name is not None)
    return (
        f'<section><h2>Where it began</h2><ol class="road">{listed}</ol>'
        "<p>Gradients travel from left to right. The red layer is the first bad one that they reached; next to it are "
        "the nearest layers without a bad element.</p></section>"
    )


def _facts(known: Mapping[str, str]) -> str:
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in known.items())
    return f"<dl>{listed}</dl>"


def _layers(recording: Recording) -> str:
    rows = [
        (
            layer.layer_name,
            f"{layer.inf_count:,}",
            f"{layer.nan_count:,}",
            f"{layer.numel:,}",
            "-" if layer.shape is None else f"{layer.dtype} [{', '.join(map(str, layer.shape))}]",
            "unknown: the gradient was gone" if layer.first_bad is None else ", ".join(elements(layer)),
        )
        for layer in recording.layers
    ]
    rest = f"<p>And {recording.layers_left_out} more layers.</p>" if recording.layers_left_out else ""
    head = ("layer", "Inf", "NaN", "of", "gradient", "first bad elements")
    return f"<section><h2>Bad layers</h2>{_table(head, rows)}{rest}</section>"


def _plots(recording: Recording) -> str:
    checks = [each.check for each in recording.history]
    figures = "".join(
        f"<figure><figcaption>{escape(name)} <span>last {number(values[-1])}</span></figcaption>"
        f"{line_plot(checks, values, name)}</figure>"
        for name, values in trails(recording).items()
    )
    return f"<section><h2>The last {len(checks)} checks</h2>{figures}</section>"


def _last_checks(recording: Recording) -> str:
    rows = [
        (
            str(each.check),
            f"{each.inf_count:,}",
            f"{each.nan_count:,}",
            number(each.grad_norm),
            rates(each),
            number(each.scale),
            "-" if each.batch_id is None else str(each.batch_id),
        )
        for each in reversed(recording.history[-_LAST_CHECKS:])
    ]
    head = ("check", "Inf", "NaN", "norm", "learning rate", "scale", "batch")
    return f"<section><h2>In numbers</h2>{_table(head, rows)}</section>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'
