"""A run that torchrun starts again is one run: it keeps its name, and hears nothing of the attempt that died."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

from deploy.stack.servers import free_port
from tests.ranks.elastic_worker import BAD_CHECK, FIRST, SECOND

SECONDS = 120


@contextmanager
def agent(folder, *launcher, **variables):
    """Run an agent of torchrun; it ends its ranks when it ends."""
    command = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "1", "--nproc-per-node"]
    command += [*launcher, "-m", "tests.ranks.elastic_worker", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", **variables}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield run
    finally:
        if run.poll() is None:
            run.send_signal(signal.SIGTERM)
        run.communicate()


def assert_two_lives_of_one_run(folder, agents, attempts):
    for each in agents:
        said, _ = each.communicate(timeout=SECONDS)
        assert each.returncode == 0, said
    lives = {file.stem: json.loads(file.read_text()) for file in folder.glob("?-?.json")}
    assert sorted(lives) == ["0-0", "0-1", "1-0", "1-1"]
    assert {name: life["attempt"] for name, life in lives.items()} == attempts
    first, second = (json.loads((folder / f"counted-{life}.json").read_text()) for life in (0, 1))
    assert first == {"reporting": 2, "nan": FIRST, "bad": [[1, FIRST, BAD_CHECK]]}
    assert second == {"reporting": 2, "nan": SECOND, "bad": [[1, SECOND, BAD_CHECK]]}
    (run_id,) = {life["run_id"] for life in lives.values()}
    return run_id


def test_one_agent_keeps_the_store_in_which_the_run_was_named(tmp_path):
    port = str(free_port())
    with agent(tmp_path, "2", "--master-addr", "127.0.0.1", "--master-port", port) as run:
        attempts = {"0-0": 0, "1-0": 0, "0-1": 1, "1-1": 1}
        assert assert_two_lives_of_one_run(tmp_path, [run], attempts) != "none"


# Else torch 2.13 keeps the agents' store after a restart, and finds the addresses of the dead in it.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def test_two_agents_that_count_their_restarts_differently_still_have_one_run(tmp_path):
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "gpt")
    hosts = [("1", "--nnodes", "2", *meeting, "--local-addr", address) for address in ("127.0.0.1", "127.0.0.2")]
    with agent(tmp_path, *hosts[0], **OWN_STORE) as one, agent(tmp_path, *hosts[1], **OWN_STORE) as two:
        attempts = {"0-0": 0, "1-0": 0, "0-1": 0, "1-1": 1}
        assert assert_two_lives_of_one_run(tmp_path, [one, two], attempts) == "gpt"
