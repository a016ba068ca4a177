"""The trap: for a few passes after trouble began it is seen where it begins, and nothing else is different."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from esper_telemetry import watch
from esper_telemetry.verdict.trap import PASSES

BATCH = torch.arange(15.0).reshape(5, 3) / 10


class Attention(nn.Module):
    """Scaled dot products in the dtype of the parameters."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        scores = self.query(x) @ self.key(x).transpose(-2, -1)
        return self.out(scores.softmax(-1) @ self.value(x))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(8), Attention()) for _ in range(2)])
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)


class Root(nn.Module):
    """Go through a root whose derivative at 0 is Inf, between two layers."""

    def __init__(self):
        super().__init__()
        self.below, self.act, self.above = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)

    def forward(self, x):
        return self.above(self.act(self.below(x)).sqrt())


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


class BadBackward(nn.Module):
    def forward(self, x):
        return Spike.apply(x)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


class Loop:
    """A loop that skips critical steps, so that its model stays as it is."""

    def __init__(self, model, **options):
        self.model = model
        self.optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.01)
        self.monitor = watch(model, optimizer=self.optimizer, on_critical="skip", **options)

    def step(self, x=BATCH, loss=torch.sum, forward=None):
        self.optimizer.zero_grad()
        loss((forward or self.model)(x)).backward()
        self.optimizer.step()
        return self.monitor.snapshot

    def cause(self, passes=2, **options):
        for _ in range(passes):
            snapshot = self.step(**options)
        assert snapshot.monitor_errors == 0
        return snapshot.cause


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def poisoned():
    batch = BATCH.clone()
    batch[1, 2] = math.nan
    return batch


def test_a_poisoned_batch_is_named_as_input():
    assert Loop(network()).cause(x=poisoned()) == "input"


def test_a_poisoned_batch_is_named_also_where_the_model_is_never_called_as_a_whole():
    model = network()
    assert Loop(model).cause(x=poisoned(), forward=lambda x: model[2](model[0](x).tanh())) == "input"


def test_a_parameter_that_was_bad_before_is_named_at_the_first_bad_check():
    loop = Loop(network())
    loop.step()
    with torch.no_grad():
        loop.model[2].weight[0, 0] = math.nan
    assert loop.cause(passes=1) == "parameter 2.weight"


def test_parameters_that_the_trouble_itself_has_damaged_are_no_cause():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = watch(model, optimizer=optimizer)
    for x in (BATCH, poisoned(), BATCH, BATCH):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    assert monitor.snapshot.damage == "parameters"
    assert monitor.snapshot.cause is None, "what the first bad pass did was not seen"


def test_an_overflow_of_attention_in_half_precision_is_named_by_its_module():
    torch.manual_seed(0)
    model = Transformer().half()
    with torch.no_grad():
        for linear in (model.blocks[1][1].query, model.blocks[1][1].key):
            linear.weight *= 1000
    assert Loop(model).cause(x=BATCH.half()) == "forward of blocks.1.1"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_overflow_under_autocast_is_named_by_its_module(dtype):
    torch.manual_seed(0)
    model = Transformer()
    with torch.no_grad():
        for linear in (model.blocks[0][1].query, model.blocks[0][1].key):
            linear.weight *= 1e3 if dtype is torch.float16 else 1e25

    def forward(x):
        with torch.autocast("cpu", dtype=dtype):
            return model(x)

    assert Loop(model).cause(forward=forward) == "forward of blocks.0.1"


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_overflow_below_a_checkpoint_is_named_by_its_module(reentrant):
    class Overflow(nn.Module):
        def forward(self, x):
            return (x * 1e38) * 1e38 - (x * 1e38) * 1e38

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(3, 4), nn.Sequential(nn.ReLU(), Overflow()), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(checkpoint(self.inner, self.first(x), use_reentrant=reentrant))

    assert Loop(Checkpointed()).cause() == "forward of inner.1"


def test_a_module_that_returns_dicts_and_is_called_with_names():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, *, x):
            return {"logits": [self.inner(x["batch"])]}

    model = Named()
    cause = Loop(model).cause(forward=lambda x: model(x={"batch": x})["logits"][0], x=poisoned())
    assert cause == "input"


@pytest.mark.parametrize("loss", [lambda out: out.sum() * math.nan, lambda out: (out - out).sum().sqrt()])
def test_a_loss_outside_the_model_is_named(loss):
    assert Loop(network()).cause(loss=loss) == "loss"


def test_a_loss_that_the_model_returns_beside_its_logits_is_named():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x):
            logits = self.inner(x)
            return {"loss": (logits.sum() - logits.sum()).log() * logits.sum(), "logits": logits}

    model = WithLoss()
    assert Loop(model).cause(forward=lambda x: model(x)["loss"]) == "loss"


def test_a_loss_that_is_a_module_of_the_model_is_named():
    class Trained(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.loss = nn.Linear(3, 4), nn.PoissonNLLLoss(log_input=False, eps=0.0)

        def forward(self, x):
            return self.loss(self.inner(x) * 0, torch.ones(5, 4))

    assert Loop(Trained()).cause() == "loss"


def test_a_backward_is_named_by_the_module_whose_gradient_was_finite_when_it_arrived():
    model = nn.Sequential(nn.Linear(3, 4), BadBackward(), nn.Linear(4, 2))
    assert Loop(model).cause() == "backward of 1"


def test_a_backward_of_what_a_module_does_between_its_parts_is_named_by_that_module():
    model = Root()
    with torch.no_grad():
        for parameter in model.below.parameters():
            parameter.zero_()
    assert Loop(model).cause() == "backward of Root"


def test_a_bad_gradient_of_a_parameter_alone_is_named_by_its_module():
    model = network()
    loop = Loop(model, before_check=lambda _: model[0].weight.grad.fill_(math.nan))
    assert loop.cause() == "backward of 0"


def test_the_hooks_are_on_only_while_there_is_trouble():
    loop = Loop(network())
    assert loop.step().checks == 1
    assert hooks(loop.model) == 0
    loop.step(x=poisoned())
    assert hooks(loop.model) == 2 * len(list(loop.model.modules()))
    loop.step()
    assert hooks(loop.model) == 0, "the check was good, and the model was seen intact"


def test_no_more_than_16_passes_of_an_episode_are_watched():
    model = network()
    loop = Loop(model, before_check=lambda _: model[0].weight.grad.fill_(math.nan))
    armed = 0
    for _ in range(PASSES + 10):
        loop.step()
        armed += hooks(model) > 0
    assert armed == PASSES == 16
    assert hooks(model) == 0


def test_a_new_episode_begins_after_32_good_checks_and_forgets_the_cause_of_the_last():
    loop = Loop(network())
    assert loop.cause(x=poisoned()) == "input"
    for _ in range(31):
        assert loop.step().cause == "input"
    assert loop.cause(passes=1, x=poisoned()) == "input", "the same episode"
    for _ in range(32):
        loop.step()
    assert loop.cause(passes=1, loss=lambda out: out.sum() * math.nan) is None
    assert loop.cause(passes=1, loss=lambda out: out.sum() * math.nan) == "loss"


def test_without_the_trap_only_the_look_waits_for_the_forward():
    loop = Loop(network(), trap=False)
    loop.step(x=poisoned())
    assert sum(len(module._forward_hooks) for module in loop.model.modules()) == 0
    assert loop.cause(x=poisoned()) is None
    assert loop.monitor.snapshot.damage == "intact"


def test_closing_takes_the_hooks_off():
    loop = Loop(network())
    loop.step(x=poisoned())
    assert hooks(loop.model)
    loop.monitor.close()
    assert hooks(loop.model) == 0


def test_nothing_is_different_with_the_trap_set():
    def train(trap):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 2))
        loop = Loop(model, trap=trap, before_check=lambda check: check > 2 and model[0].bias.grad.fill_(math.nan))
        for _ in range(8):
            x = torch.rand(5, 3)
            loop.step(x)
        return [
            *model.state_dict().values(),
            torch.get_rng_state(),
            *(g for p in model.parameters() if (g := p.grad) is not None),
        ]

    for with_trap, without in zip(train(True), train(False), strict=True):
        assert with_trap.numpy().tobytes() == without.numpy().tobytes()


def test_the_graph_is_the_same_with_the_trap_set():
    def graph(node):
        return type(node).__name__, [graph(each) for each, _ in node.next_functions if each is not None]

    loop = Loop(network())
    before = graph(loop.model(BATCH).sum().grad_fn)
    loop.step(x=poisoned())
    assert hooks(loop.model)
    assert graph(loop.model(BATCH).sum().grad_fn) == before


def test_a_model_with_the_trap_set_is_copied_and_pickled_without_it():
    loop = Loop(network())
    loop.step(x=poisoned())
    assert hooks(loop.model)
    for other in (copy.deepcopy(loop.model), pickle.loads(pickle.dumps(loop.model))):
        assert torch.equal(other(BATCH), loop.model(BATCH))
    saved = io.BytesIO()
    torch.save(loop.model, saved)
    saved.seek(0)
    torch.load(saved, weights_only=False)(BATCH)
    assert b"esper" not in saved.getvalue()


def test_a_module_that_raises_is_no_trouble_of_ours():
    class Fragile(nn.Module):
        def forward(self, x):
            if x.isnan().any():
                raise ArithmeticError
            return x

    loop = Loop(nn.Sequential(nn.Linear(3, 4), Fragile(), nn.Linear(4, 2)))
    loop.monitor._checks.verdict._in_trouble = True
    loop.step()
    with pytest.raises(ArithmeticError):
        loop.model(poisoned())
    loop.monitor._checks.verdict._in_trouble = True
    assert loop.cause(loss=lambda out: out.sum() * math.nan) == "loss"


def test_transforms_of_functions_pass_through():
    loop = Loop(network())
    loop.step(x=poisoned())
    parameters = dict(loop.model.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(loop.model, parameters, (x,)).sum()

    assert hooks(loop.model)
    torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, BATCH)
    assert loop.monitor.snapshot.monitor_errors == 0


class Layered(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


def compiled_whole(model):
    return torch.compile(model, backend="eager"), None


def compiled_in_place(model):
    model.compile(backend="eager")
    return model, None


def compiled_within(model):
    model.middle = torch.compile(model.middle, backend="eager")
    return model, None


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model, None


def compiled_step(model):
    return model, torch.compile(lambda x: model(x), backend="eager")


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        (compiled_whole, "input"),
        (compiled_in_place, None),
        (compiled_within, "input"),
        (compiled_forward, "input"),
        (compiled_step, None),
    ],
)
def test_nothing_is_compiled_again_and_no_hook_is_within_what_is_compiled(how, cause):
    torch._dynamo.reset()
    counters.clear()
    model, forward = how(Layered())
    loop = Loop(model)
    for _ in range(2):
        loop.step(forward=forward)
    before = copy.deepcopy(counters["frames"])
    assert before["total"] > 0
    assert loop.cause(passes=3, x=poisoned(), forward=forward) == cause
    if how is compiled_within:
        assert hooks(model.middle._orig_mod) == 0
    for _ in range(2):
        loop.step(forward=forward)
    assert counters["frames"] == before
    assert hooks(model) == 0


def test_two_processes_under_ddp_name_the_same_cause(tmp_path):
    from tests.test_verdict_trap import _train_under_ddp

    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_train_under_ddp, (str(tmp_path / "store"), queue), nprocs=2)
    assert sorted(queue.get() for _ in range(2)) == ["forward of inner.1", "forward of inner.1"]


class Overflowing(nn.Module):
    def forward(self, x):
        return (x * 1e38) * 1e38 - (x * 1e38) * 1e38


def _train_under_ddp(rank, store, queue):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("first", nn.Linear(3, 4))
    model.add_module("inner", nn.Sequential(nn.Sigmoid(), Overflowing()))
    model.add_module("last", nn.Linear(4, 2))
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.0)
    monitor = watch(ddp, optimizer=optimizer, on_critical="skip")
    for _ in range(3):
        optimizer.zero_grad()
        ddp(BATCH).sum().backward()
        optimizer.step()
    assert monitor.snapshot.monitor_errors == 0
    queue.put(monitor.snapshot.cause)
    torch.distributed.destroy_process_group()
