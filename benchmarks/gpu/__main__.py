"""`python -m benchmarks.gpu`: measure, print, and write the results."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

EXIT_USAGE = 2


class _Parser(argparse.ArgumentParser):
    """Say what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message.removeprefix('argument ')}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.draw is not None:
        from benchmarks.gpu.run import write_report

        write_report(json.loads(options.draw.read_text()), options.draw.parent)
        return 0
    if options.out is None:
        parser.error("one of --out and --draw is required")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # what was compiled by an earlier run would hide what it takes
        import torch

        if not options.rehearse and not torch.cuda.is_available():
            parser.error("no CUDA device here; --rehearse runs without one")
        from benchmarks.gpu.run import run

        run(options.out, options.only, options.minutes * 60, options.rehearse)
    return 0


def _parser() -> _Parser:
    parser = _Parser("benchmarks.gpu", description="Measure what looking at gradients costs on a GPU.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write GPU.md, gpu.png and gpu.json")
    parser.add_argument("--draw", type=Path, metavar="GPU.json", help="write GPU.md and gpu.png from it, no more")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="measure these sections alone")
    parser.add_argument("--minutes", type=float, default=7.0, help="begin no section after that (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="run without a GPU; the numbers mean nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
