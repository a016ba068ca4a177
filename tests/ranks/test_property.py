"""Random meshes, placements and bad elements: what ranks own adds up to the whole gradient, and the rank is named."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from esper_telemetry import GradientMonitor, watch
from tests.ranks.models import FaultyLinear, batch, seen, true_counts
from tests.ranks.processes import run_ranks

CASES = 8


def mesh_of(choose, size):
    """Return a mesh of all ranks, in one dimension or in two."""
    rows = choose.choice([each for each in range(1, size + 1) if size % each == 0])
    if choose.random() < 0.5:
        return init_device_mesh("cpu", (size,))
    return init_device_mesh("cpu", (rows, size // rows), mesh_dim_names=("outer", "inner"))


def placed(seed, size):
    """Place random gradients at random; return what was seen of them, and the truth."""
    choose = random.Random(seed)
    mesh = mesh_of(choose, size)
    model = nn.Module()
    for layer in range(choose.randint(1, 4)):
        shape = tuple(choose.randint(1, 9) for _ in range(choose.randint(1, 3)))
        kinds = [Replicate(), *(Shard(dimension) for dimension in range(len(shape)))]
        placements = [choose.choice(kinds) for _ in range(mesh.ndim)]
        gradient = torch.zeros(shape)
        for _ in range(choose.randint(0, 8)):
            gradient.view(-1)[choose.randrange(gradient.numel())] = choose.choice([math.nan, math.inf, -math.inf])
        parameter = nn.Parameter(distribute_tensor(torch.zeros(shape), mesh, placements))
        parameter.grad = distribute_tensor(gradient, mesh, placements)
        model.register_parameter(f"layer{layer}", parameter)
    monitor = GradientMonitor(model)
    monitor.update()
    return seen(monitor), true_counts(model)


def faulty(seed, rank, size):
    """Train a random model in a random way with a random fault of one rank; return what was seen, and the truth."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    layers = [FaultyLinear(8, 8) for _ in range(choose.randint(1, 4))]
    model = nn.Sequential(*layers)
    bad_rank, bad_layer, count = choose.randrange(size), choose.randrange(len(layers)), choose.randint(1, 64)
    if choose.random() < 0.3:
        model = DistributedDataParallel(model)
    else:
        mesh = mesh_of(choose, size)
        for layer in layers:
            if choose.random() < 0.5:
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    monitor = watch(model)
    layers[bad_layer].value = choose.choice([math.nan, math.inf])
    layers[bad_layer].bad = count if rank == bad_rank else 0
    model(batch(rank)).sum().backward()
    return seen(monitor), true_counts(model), (bad_rank, f"{bad_layer}.weight", count)


def every_case(rank, size):
    return [(placed(seed, size), faulty(seed, rank, size)) for seed in range(size * 1000, size * 1000 + CASES)]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_what_ranks_own_adds_up_and_the_rank_at_fault_is_named(size):
    ranks = run_ranks(every_case, size, size)
    for number in range(CASES):
        for kind in (0, 1):
            found = [rank[number][kind][0] for rank in ranks]
            nan, inf = ranks[0][number][kind][1]
            where = f"case {number}, {('placed', 'faulty')[kind]}: {found}"
            assert sum(each["owned"] for each in found) == nan, where
            assert sum(each["owned_inf"] for each in found) == inf, where
            assert not any(each["errors"] or each["unmeasured"] for each in found), where
        bad_rank, layer, count = ranks[0][number][1][2]
        for rank, each in enumerate(found):
            if size == 1:
                assert each["local"] is None, where
            else:
                own = each["local"] + each["local_inf"]
                assert (own, each["layer"]) == ((count, layer) if rank == bad_rank else (0, None)), where
