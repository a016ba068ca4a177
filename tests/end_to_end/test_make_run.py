"""What a newcomer sees: the command behind `make run`, scraped while it trains."""

import re
import subprocess
import sys
import urllib.request
from pathlib import Path

from deploy.stack.servers import find

ESPER = Path(sys.executable).with_name("esper")

KNOWN_LINT = [
    'esper_inf_grad_count non-histogram and non-summary metrics should not have "_count" suffix',
    'esper_nan_grad_count non-histogram and non-summary metrics should not have "_count" suffix',
]


def test_checks_grow_on_the_page_while_a_run_trains_and_promtool_finds_only_the_two_given_names():
    with subprocess.Popen(
        [ESPER, "ppo", "--episodes", "300", "--listen-address", "127.0.0.1:0"], stdout=subprocess.PIPE, text=True
    ) as run:
        try:
            url = re.search(r"http://\S+/metrics", run.stdout.readline())[0]
            seen = []
            for line in run.stdout:
                if line.startswith("update "):
                    with urllib.request.urlopen(url, timeout=10) as page:
                        text = page.read().decode()
                    seen.append(float(re.search(r"^esper_checks_total (\S+)$", text, re.MULTILINE)[1]))
                if len(seen) == 5:
                    break
        finally:
            run.terminate()
    assert seen == sorted(set(seen))
    assert seen[0] > 0
    lint = subprocess.run(
        [find("promtool"), "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert sorted((lint.stdout + lint.stderr).splitlines()) == KNOWN_LINT
