"""Pages that the integrations leave open: read them, and close them after a test."""

from urllib.request import urlopen

from esper_telemetry.integrations import page


def scrape(exporter):
    """Return metric -> value, of those without labels."""
    with urlopen(exporter.url + "/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.split(" ") for line in lines if " " in line and line[0] != "#")}


def close_pages():
    """Close what would stay until the process ends, and would wait there for a scrape."""
    for pages in page._pages.values():
        for each in pages:
            each.exporter.close(linger=0)
    page._pages.clear()
