import http.server
import re
import socket
import threading
import time
import urllib.request
from dataclasses import replace

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from esper_telemetry import start_exporter
from esper_telemetry.exporters.address import parse_address
from esper_telemetry.snapshot.damage import Damage, GoodCheck
from esper_telemetry.snapshot.ranks import DamagedRank, Ranks
from esper_telemetry.snapshot.recent import LayerCounts, RecentWindow
from esper_telemetry.snapshot.train_progress import TrainProgress
from tests import browser
from tests.snapshots import Source, bad, damaged, fresh, of_ranks
from tests.test_exporters_http import get

STATES = ("healthy", "warning", "critical", "not_measuring", "stalled", "ended")
NOT_MEASURED = "\N{EN DASH}"
TIERS = ("healthy", "warning", "critical")


def after_check(inf=0, nan=0, seconds_ago=0.0, layers=(), **changes):
    """Return the snapshot after one check that found so much in `head.weight`, or in `layers`."""
    before, now, timestamp = fresh(), time.monotonic() - seconds_ago, time.time() - seconds_ago
    if inf or nan:
        layers = layers or (LayerCounts("head.weight", inf, nan, 64),)
    origin = layers[0].layer_name if layers else None
    return replace(
        bad(),
        inf_grad_count=inf,
        nan_grad_count=nan,
        timestamp=timestamp,
        grad_norm=float("nan") if nan else float("inf") if inf else 1.5,
        layers=layers,
        origin_layer=origin,
        inf=before.inf.after(inf, timestamp, origin),
        nan=before.nan.after(nan, timestamp, origin),
        recent=before.recent.after(now, layers, (1 << len(layers)) - 1) if layers else before.recent,
        history=before.history.after(now, timestamp, inf, nan, origin),
        **{"cause": None, **changes},
    )


def in_state(state):
    """Return a snapshot that the page shows as `state`."""
    match state:
        case "warning":
            return after_check(inf=2)
        case "critical":
            return after_check(nan=7)
        case "not_measuring":
            return fresh()
        case "stalled":
            return after_check(seconds_ago=100)
        case "ended":
            return after_check(ended=True)
    return after_check()


@pytest.fixture(scope="module")
def chromium():
    with browser.browser() as launched:
        yield launched


@pytest.fixture
def source():
    return Source(after_check())


@pytest.fixture
def exporter(source):
    exporter = start_exporter(source, "127.0.0.1:0")
    yield exporter
    exporter.close(linger=0)


@pytest.fixture
def page(chromium, exporter):
    """Show the exporter's page; fail when it complained or asked for anything from elsewhere."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on(
        "request",
        lambda request: request.url.startswith((exporter.url, "data:")) or page.complaints.append(request.url),
    )
    page.goto(exporter.url)
    yield page
    page.context.close()
    assert [each for each in page.complaints if "ERR_CONNECTION" not in each] == []


def shows(page, state, *texts):
    page.evaluate("poll()")  # sooner than the next second
    expect(page.locator("#banner")).to_have_attribute("data-state", state, timeout=10_000)
    expect(page.locator("#word")).to_have_text(state.replace("_", " ").upper())
    for text in texts:
        expect(page.locator("#lines")).to_contain_text(text)


@pytest.mark.parametrize(
    ("state", "inf", "nan", "text"),
    [
        ("healthy", "0", "0", "No bad check in this run."),
        ("warning", "2", "0", "2 Inf in one check, first in head.weight, since "),
        ("critical", "0", "7", "7 NaN in one check, first in head.weight, since "),
        ("not_measuring", NOT_MEASURED, NOT_MEASURED, "no gradient has been measured yet"),
        ("stalled", "0", "0", re.compile(r"No check for 1\d\d s, since ")),
        ("ended", "0", "0", "The run has ended"),
    ],
)
def test_each_state_says_what_it_is(page, source, state, inf, nan, text):
    source.snapshot = in_state(state)
    shows(page, state, text)
    expect(page.locator("#inf dd")).to_have_text(inf)
    expect(page.locator("#nan dd")).to_have_text(nan)
    expect(page).to_have_title(re.compile(f"^{state.replace('_', ' ').upper()}"))


def test_the_verdict_stands_beside_the_count(page, source):
    source.snapshot = after_check(nan=7)
    shows(page, "critical", "7 NaN in one check", "The model is intact: training can continue.")
    good = GoodCheck(check=9, timestamp=time.time() - 41, step=9)
    source.snapshot = after_check(nan=7, found_damage=damaged().found_damage, cause="input", last_good_check=good)
    shows(page, "critical", "Parameters damaged: stop and go back to the last good checkpoint. It began in: input.")
    shows(page, "critical", re.compile(r"Last good check 4\d s \(31 checks\) ago\."))
    expect(page.locator("#model")).to_contain_text("Verdictparameters damagedBad in parameters3Bad in buffers0")
    expect(page.locator("#model")).to_contain_text("exp_avg of policy.weight1 Inf and 3 NaN")
    source.snapshot = after_check(found_damage=Damage(optimizer=damaged().found_damage.optimizer))
    shows(page, "critical", "Optimizer state damaged: parameters are still finite, but the next steps will")


def test_a_model_that_nobody_has_looked_at_is_not_said_to_be_intact(page, source):
    source.snapshot = after_check(found_damage=None)
    shows(page, "healthy")
    expect(page.locator("#model")).to_contain_text("Verdictnot scanned yet")


def test_layers_that_could_not_be_measured_are_no_calm_zero(page, source):
    names = ("body.weight", "body.bias", "head.weight", "head.bias")
    healthy = after_check()
    recent = healthy.recent.after(time.monotonic(), (), 0, len(names))
    source.snapshot = replace(healthy, unmeasured_layers=names, recent=recent)
    said = "4 layers were not measured in one check, because other code removed the gradient: body.weight, "
    shows(page, "not_measuring", said, "and others")
    source.snapshot = replace(in_state("critical"), unmeasured_layers=names[:1])
    shows(page, "critical", "7 NaN in one check", "1 layer was not measured in one check")


def test_the_page_shows_how_training_goes(page, source):
    source.snapshot = replace(
        after_check(), progress=TrainProgress(loss=0.75, learning_rate=3e-4, step=40, samples=640)
    )
    shows(page, "healthy")
    expect(page.locator("#progress")).to_contain_text("Loss0.75")
    source.snapshot = replace(after_check(), progress=None)
    page.evaluate("poll()")
    expect(page.locator("#progress-card")).to_be_hidden()


def test_the_page_shows_why_steps_were_not_taken(page, source):
    source.snapshot = after_check(skipped_updates={"amp": 0, "intervention": 3, "rewind": 2, "engine": 1})
    shows(page, "healthy")
    expect(page.locator("#facts")).to_contain_text(
        "Skipped by intervention3Rewound to a good state2Skipped by the engine1"
    )
    source.snapshot = after_check(skipped_updates={"amp": 0, "intervention": 3, "rewind": 0})
    page.evaluate("poll()")
    expect(page.locator("#facts")).not_to_contain_text("Rewound")
    expect(page.locator("#facts")).not_to_contain_text("engine")


class SubPath(http.server.BaseHTTPRequestHandler):
    """Stand for a reverse proxy that serves an exporter below a path of its own."""

    def do_GET(self):
        if not self.path.startswith("/runs/7/"):
            self.send_error(404)
            return
        with urllib.request.urlopen(self.server.exporter + self.path.removeprefix("/runs/7")) as answer:
            self.send_response(answer.status)
            for name in ("Content-Type", "Content-Security-Policy"):
                if answer.headers[name] is not None:
                    self.send_header(name, answer.headers[name])
            self.end_headers()
            self.wfile.write(answer.read())

    def log_message(self, *_):
        pass


def test_the_page_works_below_the_path_of_a_proxy(chromium, exporter, source):
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), SubPath)
    proxy.exporter = exporter.url
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    context = chromium.new_context()
    page = context.new_page()
    try:
        page.goto(f"http://127.0.0.1:{proxy.server_port}/runs/7/")
        source.snapshot = in_state("critical")
        shows(page, "critical", "7 NaN in one check")
        page.get_by_role("link", name="Metrics").click()
        expect(page.locator("body")).to_contain_text("esper_nan_grad_recent_max 7.0")
    finally:
        context.close()
        proxy.shutdown()
        proxy.server_close()


def test_a_bad_check_of_a_moment_is_seen_with_the_healthy_one_after_it(page, source):
    source.snapshot = replace(in_state("critical"), nan_grad_count=0)
    shows(page, "critical", "1 bad check", "Last check ", "NaN 0.")


def test_trouble_that_is_over_is_remembered(page, source):
    source.snapshot = replace(after_check(nan=7, seconds_ago=300), nan_grad_count=0, layers=(), timestamp=time.time())
    shows(page, "healthy", "Last bad check 5 min ago", "first in head.weight")
    expect(page.locator("#no-layers")).to_have_text("No bad layer in the last 2 min.")
    assert page.locator("#nan-trend rect.critical").count() == 1
    expect(page.locator("#nan-trend")).to_have_attribute(
        "aria-label", re.compile("at most 7 in one check, last (290|300) s|5 min")
    )


def test_a_lost_connection_says_since_when_and_what_was_known_and_heals(page, source, exporter):
    source.snapshot = in_state("critical")
    shows(page, "critical")
    address = exporter.url.removeprefix("http://")
    exporter.close(linger=0)
    shows(page, "gone", "No answer from the trainer since ", "Last known: CRITICAL. 7 NaN")
    expect(page.locator("#nan dd")).to_have_text("7")
    source.snapshot = in_state("healthy")
    again = start_exporter(source, address)
    shows(page, "healthy")
    again.close(linger=0)


def test_a_trainer_that_takes_connections_and_does_not_answer_is_gone(page, exporter):
    shows(page, "healthy")
    address = parse_address(exporter.url.removeprefix("http://"))
    exporter.close(linger=0)
    with socket.create_server(address):
        shows(page, "gone")


def test_an_exporter_that_fails_is_no_healthy_trainer(page, source):
    shows(page, "healthy")
    source.snapshot = replace(source.snapshot, run=None)
    shows(page, "gone", "Error 500 from the trainer since ", "Last known: HEALTHY.")
    page.complaints.clear()  # the browser complains about each


def test_a_run_that_had_ended_does_not_look_lost_when_its_exporter_closes(page, source, exporter):
    source.snapshot = in_state("ended")
    shows(page, "ended")
    exporter.close(linger=0)
    shows(page, "ended", "and its exporter closed")


def test_names_with_html_in_them_are_text(page, source):
    name = '<img src="http://127.0.0.1:9/x" onerror="document.title=1"><script>document.title=2</script>'
    source.snapshot = after_check(layers=(LayerCounts(name, 0, 7, 10),), nan=7)
    shows(page, "critical", name)
    expect(page.locator("#layers tbody td").first).to_have_text(name)
    assert page.locator("img").count() == 0
    expect(page).to_have_title(re.compile("^CRITICAL"))


def test_two_hundred_bad_layers_are_fifty_rows_and_a_number(page, source):
    layers = tuple(LayerCounts(f"blocks.{number}.attention.weight", 0, 200 - number, 4096) for number in range(200))
    source.snapshot = after_check(layers=layers, nan=20100)
    shows(page, "critical", "20,100 NaN in one check, first in blocks.0.attention.weight")
    expect(page.locator("#layers tbody tr")).to_have_count(50)
    expect(page.locator("#no-layers")).to_have_text("and 150 more bad layers")
    assert page.locator("#layers tbody tr").first.inner_text().split() == [
        "blocks.0.attention.weight",
        "0",
        "200",
        "4.88",
        "%",
    ]


def test_heads_ppo_and_the_cost_are_shown_where_there_are_any(page, source):
    source.snapshot = bad()
    expect(page.locator("#heads tbody tr").first).to_have_text(re.compile(r"policy\s*\+Inf\s*● found\s*○ none"))
    expect(page.locator("#ppo")).to_contain_text("Explained variancenot measured")
    expect(page.locator("#cost")).to_contain_text("Per check6.25 ms")
    source.snapshot = replace(bad(), ppo=None, watched_heads=None)
    expect(page.locator("#heads-card, #ppo-card").filter(visible=True)).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_tiers_are_told_apart_without_colour_and_the_worst_is_the_loudest(page, source, scheme):
    page.emulate_media(color_scheme=scheme)
    looks = {}
    for state in TIERS:
        source.snapshot = in_state(state)
        shows(page, state)
        looks[state] = page.evaluate(
            """() => {
                const banner = getComputedStyle(document.querySelector("#banner"));
                const word = getComputedStyle(document.querySelector("#word"));
                const all = [...document.querySelectorAll("body *")];
                const sizes = all.map(element => parseFloat(getComputedStyle(element).fontSize));
                return {
                    weight: Number(word.fontWeight), size: parseFloat(word.fontSize), biggest: Math.max(...sizes),
                    border: parseFloat(banner.borderTopWidth), ground: banner.backgroundColor,
                    shape: document.querySelector("#shape").getAttribute("href"),
                };
            }"""
        )
    healthy, warning, critical = looks.values()
    assert healthy["weight"] < warning["weight"] < critical["weight"]
    assert healthy["border"] < warning["border"]
    assert critical["size"] == critical["biggest"] > 1.5 * warning["size"]
    assert grey(critical["ground"]) != pytest.approx(grey(healthy["ground"]), abs=30)
    assert grey(warning["ground"]) == grey(healthy["ground"])
    assert len({look["shape"] for look in looks.values()}) == 3


@pytest.mark.parametrize("state", ["not_measuring", "stalled", "ended"])
def test_what_is_not_known_to_be_healthy_is_grey_and_dashed(page, source, state):
    source.snapshot = in_state(state)
    shows(page, state)
    red, green, blue = rgb(page.locator("#word").evaluate("word => getComputedStyle(word).color"))
    assert max(red, green, blue) - min(red, green, blue) < 25
    assert page.locator("#banner").evaluate("banner => getComputedStyle(banner).borderTopStyle") == "dashed"


def rgb(colour):
    return [float(part) for part in re.findall(r"[\d.]+", colour)][:3]


def grey(colour):
    return sum(weight * part for weight, part in zip((0.299, 0.587, 0.114), rgb(colour), strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(page, source, exporter, scheme):
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    for state in (*STATES, "gone"):
        source.snapshot = in_state(state)
        if state == "gone":
            shows(page, "healthy")
            exporter.close(linger=0)
        shows(page, state)
        found = Axe().run(page).response["violations"]
        assert [(each["id"], each["impact"], each["nodes"][0]["html"]) for each in found] == []


def test_news_is_announced_once_and_not_every_second(page, source):
    shows(page, "healthy")
    expect(page.get_by_role("status")).to_contain_text("healthy.")
    page.evaluate(
        """() => {
            window.announced = [];
            new MutationObserver(changes => changes.forEach(change => window.announced.push(change.target.textContent)))
                .observe(document.querySelector("#shouted"), {childList: true});
        }"""
    )
    source.snapshot = in_state("critical")
    expect(page.get_by_role("alert")).to_contain_text("critical. 7 NaN in one check")
    for _ in range(3):
        page.evaluate("poll()")
    assert len(page.evaluate("window.announced")) == 1


def test_it_stands_still_for_who_asked_for_less_motion(page, source):
    source.snapshot = in_state("critical")
    shows(page, "critical")
    assert page.evaluate("document.getAnimations().length") == 1
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate("document.getAnimations().length") == 0


def test_the_keyboard_reaches_the_links_and_the_focus_is_seen(page):
    shows(page, "healthy")
    for target in ("metrics", "api/v1/status"):
        page.keyboard.press("Tab")
        focused = page.locator(":focus-visible")
        expect(focused).to_have_attribute("href", target)
        assert focused.evaluate("link => getComputedStyle(link).outlineStyle") == "solid"


@pytest.mark.parametrize("width", [320, 768, 3840])
def test_nothing_is_wider_than_the_screen(page, source, width):
    page.set_viewport_size({"width": width, "height": 800})
    long_name = "_orig_mod." + "transformer.layers.encoder." * 8 + "weight"
    source.snapshot = after_check(inf=10**12, nan=7, layers=(LayerCounts(long_name, 10**12, 7, 10**13),))
    shows(page, "critical")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(
        "[...document.querySelectorAll('#banner *, main *')].every(e => e.getBoundingClientRect().right <= innerWidth)"
    )


def test_the_policy_lets_nothing_in_but_the_page_itself(exporter, page):
    policy = dict(part.split(" ", 1) for part in get(exporter, "/")[1]["Content-Security-Policy"].split("; "))
    assert policy.pop("script-src").startswith("'sha256-")
    assert policy.pop("style-src").startswith("'sha256-")
    assert policy == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert "unsafe" not in str(policy)


def test_rank_0_shows_who_reports_and_which_rank_was_bad_first(page, source):
    snapshot = after_check(nan=4)
    bad_rank = replace(of_ranks(0, 7).bad[0], last=time.monotonic())
    recent = RecentWindow(120.0).after(time.monotonic(), (LayerCounts("", 0, 7, 0),), 0)
    source.snapshot = replace(snapshot, ranks=replace(of_ranks(), bad=(bad_rank,), recent=recent))
    shows(page, "critical")
    card = page.locator("#ranks-card")
    expect(card).to_contain_text("2 of 2")
    expect(card.locator("tbody td")).to_have_text(["1", "gpu-7", "policy.weight", "0", "7"])


def test_rank_0_gives_the_verdict_on_the_whole_model_not_on_its_own_part(page, source):
    damaged_rank = DamagedRank(1, "gpu-7", "parameters", 3, "value.weight")
    bad_rank = replace(of_ranks(0, 7).bad[0], last=time.monotonic())
    ranks = replace(of_ranks(damaged=(damaged_rank,)), bad=(bad_rank,))
    source.snapshot = replace(after_check(found_damage=Damage()), ranks=ranks)
    shows(page, "critical", "Parameters damaged: stop and go back to the last good checkpoint. It began in: input.")
    card = page.locator("#ranks-card")
    expect(card).to_contain_text("Damaged ranks1Rank 1 on gpu-73 in parameters, worst value.weight")
    expect(page.locator("#model-note")).to_have_text("this rank")


def test_another_rank_leads_to_rank_0(page, source):
    run = replace(bad().run, rank=1, world_size=2)
    ranks = replace(Ranks.unknown(2, 120.0), leader="http://10.0.0.1:19301")
    source.snapshot = replace(after_check(), run=run, ranks=ranks)
    shows(page, "healthy")
    expect(page.get_by_role("link", name="rank 0 shows the run")).to_have_attribute("href", "http://10.0.0.1:19301")


def test_a_run_of_one_has_no_card_of_ranks(page, source):
    source.snapshot = replace(after_check(), ranks=None)
    shows(page, "healthy")
    expect(page.locator("#ranks-card")).to_be_hidden()
