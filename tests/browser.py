"""A real browser for the tests and the pictures of the exporter's page."""

import os
from contextlib import contextmanager

from playwright.sync_api import sync_playwright

from deploy.stack import servers


@contextmanager
def browser():
    """Run a headless browser: the Chromium on PATH, or Debian's, fetched as the servers are."""
    program = servers.find("chromium")
    with sync_playwright() as playwright:
        own = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has no sandbox for root
        launched = playwright.chromium.launch(executable_path=program, args=own)
        yield launched
        launched.close()
