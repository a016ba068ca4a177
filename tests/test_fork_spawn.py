"""What a second process has of us: nothing, unless it starts its own."""

import copy
import pickle
import socket
import threading
import urllib.request
from contextlib import closing

import pytest
import torch
import torch.multiprocessing
from torch.utils.data import DataLoader, Dataset

from esper_telemetry import start_exporter, watch
from esper_telemetry.exporters.address import parse_address
from tests.snapshots import Source, fresh

CONTEXTS = ("fork", "spawn", "forkserver")


class OurThreads(Dataset):
    """Tell how many threads of ours run where an item is made."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return sum(thread.name.startswith("esper") for thread in threading.enumerate())


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_data_loader_worker_neither_serves_nor_holds_a_socket(context):
    exporter = start_exporter(Source(fresh()), "127.0.0.1:0")
    address = parse_address(exporter.url.removeprefix("http://"))
    with closing(socket.create_connection(address, timeout=30)) as client:
        client.sendall(b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        loader = DataLoader(OurThreads(), num_workers=1, multiprocessing_context=context, persistent_workers=True)
        assert next(iter(loader)).item() == 0
        exporter.close()
        assert client.recv(65536) == b""  # would wait if the worker, which is still there, held the connection
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    start_exporter(Source(fresh()), f"127.0.0.1:{address[1]}").close()


def watched():
    model = torch.nn.Linear(3, 2)
    return model, watch(model)


def is_bare(model):
    return not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_watched_model_is_not_watched(duplicate):
    model, monitor = watched()
    other = duplicate(model)
    assert is_bare(other)
    other(torch.ones(1, 3)).sum().backward()
    assert monitor.snapshot.checks == 0
    model(torch.ones(1, 3)).sum().backward()
    assert monitor.snapshot.checks == 1
    monitor.close()


def watch_your_own(rank, model):
    """Watch, measure and serve in a child; what is wrong raises, and fails the child."""
    monitor = watch(model)
    exporter = start_exporter(monitor, "127.0.0.1:0", linger=0)
    model(torch.full((1, 3), torch.inf)).sum().backward()
    with urllib.request.urlopen(f"{exporter.url}/metrics", timeout=30) as page:
        assert b"\nesper_inf_grad_count 6.0\n" in page.read()
    exporter.close()


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_child_is_given_a_watched_model_and_watches_its_own(context):
    model, monitor = watched()
    exporter = start_exporter(monitor, "127.0.0.1:0")
    torch.multiprocessing.start_processes(watch_your_own, (model,), nprocs=1, start_method=context)
    assert monitor.snapshot.checks == 0
    exporter.close()
    monitor.close()
