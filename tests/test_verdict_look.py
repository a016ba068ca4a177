"""A look at a model's state waits for no device, also where a part of the state is on the host."""

import math

import pytest
import torch

from esper_telemetry import watch
from esper_telemetry.scan import scan
from esper_telemetry.verdict.look import Looks
from esper_telemetry.verdict.state import Held


class OnDevice(torch.Tensor):
    """A tensor that says that it is on a device."""

    is_cuda = True


class Later:
    """A scan whose result arrives when the test says so."""

    def __init__(self, tensors):
        self._found = scan([tensor.as_subclass(torch.Tensor) for tensor in tensors])
        self.arrived = False

    def ready(self):
        return self.arrived

    def result(self):
        assert self.arrived, "somebody waits for the device"
        return self._found


def test_what_is_on_the_host_does_not_make_the_look_wait_for_a_device():
    launched, found = [], []

    def scan_here(tensors):
        on_device = {tensor.is_cuda for tensor in tensors}
        assert len(on_device) == 1, "both at once can only be scanned by waiting"
        if not on_device.pop():
            return scan(tensors)
        launched.append(Later(tensors))
        return launched[-1]

    looks = Looks(lambda damage, mark: found.append((damage, mark)))
    looks._scan = scan_here
    weight = torch.tensor([1.0, math.nan]).as_subclass(OnDevice)
    steps = torch.tensor(math.inf)
    looks.launch([Held("parameters", "w", weight, False), Held("optimizer", "step of w", steps, False)], mark=True)
    looks.settle()
    assert (found, looks.pending) == ([], True)
    launched[0].arrived = True
    looks.settle()
    ((damage, mark),) = found
    assert mark
    assert [(each.layer_name, each.nan_count) for each in damage.parameters] == [("w", 1)]
    assert [(each.layer_name, each.inf_count) for each in damage.optimizer] == [("step of w", 1)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_looks_at_a_model_on_a_device_never_synchronise():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)).cuda()
    optimizer = torch.optim.Adam(model.parameters())
    batches = [torch.ones(4, 8).cuda() for _ in range(12)]
    batches[6][0, 0] = math.nan
    monitor = watch(model, damage_every=2)
    for step, batch in enumerate(batches):
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        try:
            optimizer.zero_grad()
            model(batch).sum().backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    monitor.flush()
    assert not monitor.safe_to_save()
    assert (monitor.snapshot.damage, monitor.snapshot.monitor_errors) == ("parameters", 0)
