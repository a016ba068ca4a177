"""Real ranks: processes that join a gloo group and run the same function, in a session of seconds."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from contextlib import suppress
from datetime import timedelta

DEADLINE = 240.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.ranks.preloaded"])


def run_ranks(function, size=2, *args, join=True, may_die=(), **environ):
    """Run `function(rank, *args)` in so many processes, and return what each returned, by rank.

    join: whether they are one group before it is called; without, MASTER_ADDR and MASTER_PORT are set.
    may_die: the ranks that may end without a word; None stands for what they return.
    Raise AssertionError with the traceback of the first rank that raised.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(size):
        here, there = _context.Pipe(duplex=False)
        given = (there, function, rank, size, port, join, args, environ)
        process = _context.Process(target=_run, args=given, daemon=True)
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        return [_receive(pipe, rank, rank in may_die) for rank, pipe in enumerate(pipes)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _receive(pipe, rank, may_die):
    assert pipe.poll(DEADLINE), f"rank {rank} said nothing for {DEADLINE} s"
    try:
        value, error = pipe.recv()
    except EOFError:
        assert may_die, f"rank {rank} died"
        return None
    assert error is None, f"rank {rank}:\n{error}"
    return value


def _run(pipe, function, rank, size, port, join, args, environ):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | environ
    try:
        if join:
            join_group(rank, size)
        pipe.send((function(rank, *args), None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))
    pipe.close()
    with suppress(Exception):
        dist.destroy_process_group()


def join_group(rank, size, seconds=60):
    """Join the group of these ranks."""
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=seconds))
