"""The blocks of docs/ranks.md run as they stand there, on a rank as torchrun starts it."""

import os
import subprocess
import sys

import pytest

from deploy.stack.servers import free_port
from tests.documents import blocks

BLOCKS = blocks("ranks.md")
BLOCKS.pop("Ray Train")  # tests/engines/test_ray.py runs it
SAY = "\nmodel(__import__('torch').ones(2, 8)).sum().backward()\nprint(monitor.snapshot.scope.scope)\n"


@pytest.mark.parametrize("heading", BLOCKS)
def test_it_runs_on_a_rank(heading):
    launched = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    run = subprocess.run(
        [sys.executable, "-c", BLOCKS[heading] + SAY],
        env=os.environ | launched | {"MASTER_PORT": str(free_port()), "ESPER_LINGER_SECONDS": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout.strip()) == (0, "whole"), run.stderr
