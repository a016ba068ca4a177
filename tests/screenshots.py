"""Take the pictures of the exporter's page in docs/pictures: real runs, real faults, a real browser; about a minute."""

import io
import os
import signal
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Error, expect

from deploy.stack.servers import free_port
from tests.browser import browser

PICTURES = Path("docs/pictures")
SCREEN, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
FIRST_ANSWER_MS = 60_000.0
TROUBLE_MS = 120_000.0
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # so that the runs leave each other, and the browser, some processor time

TRAINER = (sys.executable, "-m", "tests.end_to_end.trainer")
PPO = (str(Path(sys.executable).with_name("esper")), "ppo", "--episodes", "1000000")
RUNS = {
    "healthy": PPO,
    "warning": (*TRAINER, "--inject", "inf:2@600:2.weight", "--window", "3600"),  # PPO would soon die of 2 Inf
    "critical": (*PPO, "--inject", "nan:7@800:action_net.weight", "--on-critical", "skip"),
    "not_measuring": (*TRAINER, "--wait"),
}


@contextmanager
def run(command):
    """Run a trainer and yield it, with the `.url` of its exporter."""
    address = f"127.0.0.1:{free_port()}"
    option = "--listen-address" if "ppo" in command else "--address"
    trainer = subprocess.Popen(
        [*command, option, address], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=os.environ | ONE_THREAD
    )
    trainer.url = f"http://{address}"
    try:
        yield trainer
    finally:
        trainer.kill()
        trainer.wait()
        trainer.stdin.close()


def take(page, state, name):
    """Wait until the page is in a state and take its picture; return the banner's."""
    expect(page.locator("#banner")).to_have_attribute("data-state", state, timeout=TROUBLE_MS)
    page.screenshot(path=PICTURES / f"page-{name}.png", full_page=True, animations="disabled")
    return page.locator("#banner").screenshot(animations="disabled")


def visit(chromium, url, **options):
    """Open the page of an exporter as soon as it is up."""
    page = chromium.new_page(**options)
    for _ in range(int(FIRST_ANSWER_MS / 500)):
        try:
            page.goto(url)
            return page
        except Error:
            page.wait_for_timeout(500)
    raise TimeoutError(f"nothing answers at {url}")


def stack_in_grey(banners, path):
    """Put the banners under each other, in greyscale."""
    pictures = [Image.open(io.BytesIO(banner)).convert("L") for banner in banners]
    gap = 16
    size = (max(each.width for each in pictures) + 2 * gap, sum(each.height + gap for each in pictures) + gap)
    sheet, top = Image.new("L", size, 245), gap
    for picture in pictures:
        sheet.paste(picture, (gap, top))
        top += picture.height + gap
    sheet.save(path)


def main():
    """Take all of them."""
    PICTURES.mkdir(exist_ok=True)
    with ExitStack() as stack:
        chromium = stack.enter_context(browser())
        trainers = {state: stack.enter_context(run(command)) for state, command in RUNS.items()}
        pages = {state: visit(chromium, trainer.url, viewport=SCREEN) for state, trainer in trainers.items()}
        banners = {
            state: take(pages[state], state, state.replace("_", "-"))
            for state in ("not_measuring", "warning", "critical", "healthy")
        }
        url = trainers["critical"].url
        take(visit(chromium, url, viewport=SCREEN, color_scheme="dark"), "critical", "critical-dark")
        take(visit(chromium, url, viewport=PHONE, device_scale_factor=2), "critical", "critical-phone")
        trainers["warning"].send_signal(signal.SIGKILL)
        banners["gone"] = take(pages["warning"], "gone", "gone")
        order = ("healthy", "warning", "critical", "not_measuring", "gone")
        stack_in_grey([banners[state] for state in order], PICTURES / "page-greyscale.png")


if __name__ == "__main__":
    main()
