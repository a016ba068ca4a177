"""A real browser for the tests and the pictures of the exporter's page."""

import os
import shutil
from contextlib import contextmanager

from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


class BrowserNotFound(RuntimeError):
    """Say in one line what to install."""


def find():
    """Return the browser's path; raise BrowserNotFound."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        raise BrowserNotFound("no browser on PATH: install one with `apt-get install chromium` and try again")
    return found


@contextmanager
def browser():
    """Run a headless browser."""
    program = find()
    with sync_playwright() as playwright:
        own = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has no sandbox for root
        launched = playwright.chromium.launch(executable_path=program, args=own)
        yield launched
        launched.close()
