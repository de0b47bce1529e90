"""The door to the model: what it finds, lends, calls and gives back, whatever it is given and whatever happens."""

import concurrent.futures
import contextlib
import functools
import itertools
import os
import sys
import threading
import time
import types
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from perceptual_at import (
    Lane,
    Linf,
    apgd,
    auto_attack,
    call_with,
    cw,
    evaluate,
    fab,
    fgsm,
    frozen,
    objectives,
    pgd,
    sanity_checks,
    snapshot,
    square,
)
from perceptual_at.objectives.cure import cure_gradients
from perceptual_at.victims import Terms, inspection, modules_of, opened, twins
from perceptual_at.victims.door import _HELD
from perceptual_at.weight_perturbation import ascend
from tests.strategies import generator, uniform
from tests.test_attack_contract import Net, Picture, classes_of, images

THREAT = Linf(0.1)
ATTACKS = {
    "pgd": functools.partial(pgd, steps=3, start="clean"),
    "pgd search": functools.partial(pgd, steps=3, start="clean", keep="best", early_stop=True),
    "fgsm": fgsm,
    "apgd": functools.partial(apgd, steps=4),
    "fab": functools.partial(fab, steps=3),
    "square": functools.partial(square, queries=10),
    "auto_attack": functools.partial(auto_attack, version=[("apgd-ce", {"steps": 3}), ("fab", {"steps": 2})]),
}
DRAWS = ("apgd", "square", "auto_attack")
every = pytest.mark.parametrize("name", ATTACKS)


def attacked(name, model, **options):
    drawn = {"generator": generator(0)} if name in DRAWS else {}
    return ATTACKS[name](model, images(), classes_of(), THREAT, **drawn, **options)


def training_net():
    net = Net().train()
    net.dropout.p = 0.0
    return net


# Finding ------------------------------------------------------------------------------------------------------------


class Holder:
    shared: nn.Module

    def __init__(self, **held):
        vars(self).update(held)

    def __call__(self, x):
        return self.net(x)

    def logits(self, x):
        return self.net(x)


class Slotted:
    __slots__ = ("net",)

    def __init__(self, net):
        self.net = net

    def __call__(self, x):
        return self.net(x)


class OfTheClass(Holder):
    def __call__(self, x):
        return self.shared(x)


GLOBAL = None


def by_global(x):
    return GLOBAL(x)


def by_another(x):
    return by_global(x)


def by_default(net):
    def call(x, net=net):
        return net(x)

    return call


def decorated(net):
    @functools.wraps(by_global)
    def call(x):
        return net(x)

    return call


def of_the_class(net):
    OfTheClass.shared = net
    return OfTheClass()


def of_the_module(net):
    globals()["GLOBAL"] = net
    return by_another


def of_a_file(net):
    FILE.net = net
    return lambda x: FILE.net(x)


FILE = types.ModuleType("my_models")
HIDDEN = {
    "file of models": of_a_file,
    "lambda": lambda net: lambda x: net(x),
    "partial": lambda net: functools.partial(lambda f, x: f(x), net),
    "keyword of a partial": lambda net: functools.partial(lambda x, f: f(x), f=net),
    "bound forward": lambda net: net.forward,
    "bound method of an object": lambda net: Holder(net=net).logits,
    "callable object": lambda net: Holder(net=net),
    "object in an object": lambda net: Holder(net=Holder(net=net)),
    "slots": Slotted,
    "class attribute": of_the_class,
    "dictionary": lambda net: (lambda nets: lambda x: nets["a"](x))({"a": net}),
    "list in a dictionary": lambda net: (lambda nets: lambda x: nets["a"][0](x))({"a": [net]}),
    "namespace": lambda net: (lambda space: lambda x: space.net(x))(types.SimpleNamespace(net=net)),
    "default": by_default,
    "global through functions": of_the_module,
    "decorated": decorated,
    "weak reference": lambda net: (lambda ref: lambda x: ref()(x))(weakref.ref(net)),
    "nested function": lambda net: (lambda f: lambda x: f(x))(lambda x: net(x)),
    "partial of a method": lambda net: functools.partial(Holder.logits, Holder(net=net)),
}


@pytest.mark.parametrize("way", HIDDEN)
def test_a_hidden_module_is_found_and_treated_as_a_module(way):
    net = Net().train()
    before, expected = Picture(net), pgd(net, images(), classes_of(), THREAT, start="clean")
    hidden = HIDDEN[way](net)
    assert net in modules_of(hidden)
    assert torch.equal(pgd(hidden, images(), classes_of(), THREAT, start="clean"), expected)
    before.assert_unchanged()


def test_looking_for_modules_ends():
    circle = []
    circle.append(circle)
    long = list(range(100_000))
    data = Holder(rows=[Holder(pixels=long) for _ in range(5000)])
    assert modules_of(lambda x: (circle, long, data, x)) == []


def test_names_of_attributes_are_no_globals():
    of_the_module(Net())
    assert modules_of(lambda x: x.GLOBAL) == []


def test_as_is_means_without_a_warning_too():
    hidden = iter([training_net()] * 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pgd(lambda x: next(hidden)(x), images(), classes_of(), THREAT, steps=2, model_mode="as_is")


# Models of every kind -----------------------------------------------------------------------------------------------


def scripted(net):
    return torch.jit.script(net.eval())


def folded(net):
    return torch.jit.freeze(torch.jit.script(net.eval()))


def exported(net):
    return torch.export.export(net.eval(), (images(),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))


class Recomputed(nn.Module):
    def __init__(self, net, use_reentrant):
        super().__init__()
        self.net, self.use_reentrant = net, use_reentrant

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=self.use_reentrant)


class Overwrites(nn.Module):
    """Normalises its input in place, by torch or behind its back."""

    def __init__(self, net, behind=False):
        super().__init__()
        self.net, self.behind = net, behind

    def forward(self, x):
        y = x.data if self.behind else x
        y.mul_(2.0)
        return self.net(x / 2 if not self.behind else x * 0.5)


KINDS = {
    "scripted": scripted,
    "frozen script": folded,
    "exported program": exported,
    "exported module": lambda net: exported(net).module(),
    "exported part": lambda net: nn.Sequential(exported(net).module()),
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "compiled, passes back too": lambda net: torch.compile(net, backend="aot_eager"),
    "compiled function": lambda net: torch.compile(lambda x: net(x), backend="eager"),
    "checkpoint": lambda net: Recomputed(net, False),
    "reentrant checkpoint": lambda net: Recomputed(net, True),
    "writes to its input": Overwrites,
    "writes behind torch's back": lambda net: Overwrites(net, behind=True),
    "begins with an in-place layer": lambda net: nn.Sequential(nn.Hardtanh(-9, 9, inplace=True), net),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*", "ignore:None of the inputs have requires_grad")
@every
@pytest.mark.parametrize("kind", KINDS)
def test_models_of_every_kind_are_attacked_as_the_module_is(kind, name):
    torch._dynamo.reset()
    net = training_net()
    expected = attacked(name, net)
    model = KINDS[kind](net)
    x, labels = images(), classes_of()
    drawn = {"generator": generator(0)} if name in DRAWS else {}
    found = ATTACKS[name](model, x, labels, THREAT, **drawn)
    assert torch.equal(x, images()), "the caller's images were written to"
    if not (name in ("fab", "auto_attack") and "behind" in kind):  # whose gradient is half of what it should be
        assert_close(found, expected, rtol=0, atol=1e-9)
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_reentrant_checkpoints_are_refused_where_parameters_would_get_gradients():
    hidden = iter([Recomputed(Net().eval(), True)] * 9)
    with pytest.raises(ValueError, match=r"pgd: `model` uses torch[.]utils[.]checkpoint with use_reentrant=True"):
        pgd(lambda x: next(hidden)(x), images(), classes_of(), THREAT)


def learnt(net):
    return functional.cross_entropy(net(images()), classes_of())


BY_GRAD = {
    "ascend": lambda net: ascend(net, lambda: learnt(net)),
    "grad_align": lambda net: objectives.grad_align(net, *STEP, threat=THREAT),
    "cure_gradients": lambda net: cure_gradients(net, *STEP, average=None),
}
STEP = ((images(),), classes_of(), functools.partial(pgd, threat=THREAT, steps=1))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", BY_GRAD)
def test_training_that_needs_chosen_gradients_names_reentrant_checkpoints(name):
    net = nn.Sequential(nn.Hardtanh(-9, 9), nn.Conv2d(3, 3, 1).double(), Recomputed(Net(), True))
    with pytest.raises(ValueError, match=f"{name}: `model` uses torch[.]utils[.]checkpoint with use_reentrant=True"):
        BY_GRAD[name](net)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoints_do_not_look_like_lost_gradients():
    net = Recomputed(Net().eval(), True)
    sizes = inspection.gradient_sizes(net, images(), classes_of())
    assert_close(sizes, inspection.gradient_sizes(net.net, images(), classes_of()))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_grad_align_trains_compiled_parts_which_have_no_second_derivative():
    torch._dynamo.reset()
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Tanh()).double()
    x, labels = uniform(0, 3, 12), torch.tensor([0, 1, 2])
    found = []
    for model in (net, torch.compile(net, backend="aot_eager")):
        attack = functools.partial(pgd, threat=THREAT, steps=1, start="clean")
        loss, _ = objectives.grad_align(model, (x,), labels, attack, threat=THREAT, generator=generator(0))
        found.append(torch.autograd.grad(loss, net[1].weight)[0])
    assert_close(*found)


@pytest.mark.slow
def test_cure_takes_several_gradients_of_one_pass_of_compiled_models():
    torch._dynamo.reset()
    net, found = training_net().eval(), []
    for model in (net, torch.compile(net, backend="aot_eager")):
        learnt(model).backward()  # a step of another objective, for which torch compiles the pass back
        net.zero_grad()
        cure_gradients(model, *STEP, average=None, generator=generator(0))
        found.append(next(net.parameters()).grad.clone())
    assert_close(*found)


def test_recurrent_layers_on_a_gpu_stay_in_train_mode_without_dropout(monkeypatch):
    from perceptual_at.victims import switching

    net = nn.LSTM(2, 3, num_layers=2, dropout=0.5, batch_first=True).eval()
    seen = []

    def model(x):
        seen.append((net.training, net.dropout))
        return net(x)[0][:, -1]

    monkeypatch.setattr(switching, "_on_cudnn", lambda part: True)
    pgd(model, torch.rand(4, 5, 2), torch.tensor([0, 1, 2, 0]), THREAT, steps=2)
    assert set(seen) == {(True, 0.0)}
    assert (net.training, net.dropout) == (False, 0.5)


# Distributed --------------------------------------------------------------------------------------------------------


def sharded(kind, net):
    if kind == "FSDP2":
        if not hasattr(torch.cpu.current_stream(), "record_event"):
            pytest.skip("fully_shard of this torch does not run on CPUs")
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        fully_shard(net.last, mesh=mesh)
        return fully_shard(net, mesh=mesh) or net
    if kind.startswith("FSDP1"):
        from torch.distributed.fsdp import FullyShardedDataParallel

        options = {"device_id": torch.device("cpu"), "use_orig_params": "original" in kind}
        net.last = FullyShardedDataParallel(net.last, **options)
        return FullyShardedDataParallel(net, **options)
    return nn.Sequential(nn.Identity(), nn.parallel.DistributedDataParallel(net))


def gradients(model, x, labels):
    model.zero_grad()
    functional.cross_entropy(model(x), labels).backward()
    grads = [parameter.grad for parameter in model.parameters()]
    return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]


def check_training_goes_on(kind, attacks, samples=6):
    x, labels = images(dtype=torch.float32), classes_of()
    for name, attack in attacks.items():
        model, reference = (sharded(kind, training_net().float()) for _ in range(2))
        found, alone = (
            attack(net, x[:samples], labels[:samples], THREAT, **({"generator": generator(0)} if name in DRAWS else {}))
            for net in (model, training_net().float())
        )
        assert_close(found, alone, rtol=0, atol=1e-6)
        for _ in range(2):
            ours, theirs = gradients(model, x, labels), gradients(reference, x, labels)
            assert len(ours) == len(theirs)
            for one, other in zip(ours, theirs, strict=True):
                assert (one is None) == (other is None), name
                assert one is None or torch.equal(one, other), name


def evaluated(model, x, labels, threat):
    """The worst of each sample, from batches of two."""
    attacks = {name: functools.partial(ATTACKS[name], threat=threat) for name in ("pgd search", "apgd")}
    batches = list(zip(x.split(2), labels.split(2), strict=True))
    return evaluate(model, batches, attacks, progress=False).robust["apgd"].float()


def stopped_by_an_error(model, x, labels, threat):
    """One process gives up at its third pass, and the other one finishes."""
    passes = itertools.count()

    def loss(logits, labels):
        if len(x) < 6 and next(passes) == 2:
            raise ValueError("enough")
        return functional.cross_entropy(logits, labels, reduction="none")

    with contextlib.suppress(ValueError):
        return apgd(model, x, labels, threat, steps=4, loss=loss, generator=generator(0))
    return x


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["FSDP1", "FSDP1 original", "FSDP2", "DDP"])
def test_training_of_a_sharded_model_goes_on(kind, process_group):
    check_training_goes_on(kind, ATTACKS)


def in_one_of_two_processes(rank, kind, path):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    # Processes whose samples differ need different numbers of passes.
    calls = {**ATTACKS, "evaluate": evaluated, "error": stopped_by_an_error}
    check_training_goes_on(kind, calls, samples=(6, 3)[rank])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # an interpreter that ends in order now and then aborts in torch's threads, when all is done


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
@pytest.mark.parametrize("kind", ["FSDP1", "FSDP1 original", "FSDP2", "DDP"])
def test_training_of_a_model_sharded_over_two_processes_goes_on(kind, tmp_path):
    if kind == "FSDP2" and not hasattr(torch.cpu.current_stream(), "record_event"):
        pytest.skip("fully_shard of this torch does not run on CPUs")
    processes = torch.multiprocessing.spawn(
        in_one_of_two_processes, args=(kind, tmp_path / "store"), nprocs=2, join=False
    )
    end = time.monotonic() + 300
    try:
        while not processes.join(timeout=5):
            assert time.monotonic() < end, "the processes wait for each other"
    finally:
        for process in processes.processes:
            process.kill()


@pytest.mark.parametrize("name", ["pgd", "pgd search", "fgsm", "apgd", "square"])
def test_a_loss_may_write_to_what_it_is_given(name):
    def loss(logits, labels):
        labels[labels == labels[0]] = 0
        logits -= 1e6 * functional.one_hot(labels, 5)  # by these all would be misclassified
        return logits[:, 1]

    net, labels = training_net(), classes_of()
    before = labels.clone()
    verdict = ATTACKS[name](net, images(), labels, THREAT, loss=loss, verdict=True)
    assert torch.equal(labels, before)
    assert torch.equal(verdict.success, net.eval()(verdict.x_adv).argmax(dim=1) != labels)


# Borrowers at once, and interrupts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lane", [None, Lane()], ids=["plain", "lane"])
def test_threads_find_what_each_finds_alone(lane):
    net, x, labels = training_net(), images(), classes_of()
    before = Picture(net)
    alone = pgd(net, x, labels, THREAT, start="clean", lane=lane)
    found, errors = [], []

    def attack():
        try:
            found.extend(pgd(net, x, labels, THREAT, start="clean", lane=lane) for _ in range(5))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=attack) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(found) == 20
    assert all(torch.equal(one, alone) for one in found)
    before.assert_unchanged()
    assert not _HELD


def test_a_twin_is_made_while_another_thread_runs_its_model():
    class Watched(nn.Module):
        """Has another thread run another model whenever it is itself run, or traced."""

        def __init__(self):
            super().__init__()
            self.net = training_net()

        def forward(self, x):
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                seen.append(pool.submit(other, x_other).result())
            return self.net(x)

    usual, seen, net = nn.Module.__call__, [], Watched()
    x, labels = images(), classes_of()
    other, x_other = training_net().eval(), images()[:1]
    expected = other(x_other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a model that could not be traced
        pgd(net, x, labels, THREAT, steps=1, lane=Lane())
    assert len(seen) >= 2
    assert all(torch.equal(one, expected) for one in seen)
    assert nn.Module.__call__ is usual


@pytest.mark.parametrize("lane", [None, Lane(), Lane(dtype=torch.bfloat16)], ids=["plain", "lane", "bf16"])
def test_an_attack_inside_the_loss_of_another(lane):
    net, x, labels = training_net().float(), images(dtype=torch.float32), classes_of()
    before = Picture(net)

    def loss(logits, labels):
        pgd(net, x, labels, THREAT, steps=1, start="clean", lane=lane)
        assert not net.norm.training
        return functional.cross_entropy(logits, labels, reduction="none")

    outer = pgd(net, x, labels, THREAT, steps=2, start="clean", loss=loss, lane=lane)
    assert torch.equal(outer, pgd(net, x, labels, THREAT, steps=2, start="clean", lane=lane))
    before.assert_unchanged()


def test_borrowers_may_leave_in_any_order():
    net = training_net()
    before = Picture(net)
    first, second = frozen(net), frozen(net.norm)
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert not net.norm.training
    assert net.training
    second.__exit__(None, None, None)
    before.assert_unchanged()


class Switching(nn.Module):
    """Does more than to set flags when it is switched, as layers do that merge weights or choose a branch."""

    def __init__(self, frozen_part=None):
        super().__init__()
        self.inner, self.frozen_part, self.branch = training_net(), frozen_part, "train"

    def train(self, mode=True):
        super().train(mode)
        self.branch = "train" if mode else "eval"
        return self

    def forward(self, x):
        assert self.branch == "eval"
        return self.inner(x)


def modes(model):
    return [(part.training, getattr(part, "branch", None)) for part in model.modules()]


def test_modules_that_train_in_a_way_of_their_own_are_switched_back_by_it():
    model = nn.Sequential(Switching(Switching().eval()), nn.Identity()).train()
    model[0].frozen_part.eval()
    before = modes(model)
    assert {branch for _, branch in before} == {"train", "eval", None}
    attacked("pgd", model)
    assert modes(model) == before
    part, whole = frozen(model[0].inner), frozen(model)
    part.__enter__(), whole.__enter__()
    whole.__exit__(None, None, None)
    assert model[0].branch == "train"
    assert not any(one.training for one in model[0].inner.modules())  # still on loan
    part.__exit__(None, None, None)
    assert modes(model) == before


def rewritten(net):
    """An export whose graph is rewritten when it is switched, and whose flag stays, as torchao has it."""
    model = torch.export.export(net, (images(),), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)).module()

    def train(mode=True):
        for node in model.graph.nodes:
            if node.target is torch.ops.aten.dropout.default:
                node.args = (*node.args[:2], mode)
        model.recompile()

    model.train, model.eval = train, functools.partial(train, False)
    return model


class Branching(nn.Module):
    """Chooses a branch when it is switched, and leaves its flag alone."""

    def __init__(self, net):
        super().__init__()
        self.net, self.branch = net, "train"

    def train(self, mode=True):
        self.branch = "train" if mode else "eval"
        return self

    def forward(self, x):
        assert self.branch == "eval"
        return self.net(x)


@pytest.mark.parametrize("made", [rewritten, Branching])
@pytest.mark.parametrize("mode", [True, False])
def test_what_is_switched_by_more_than_flags_comes_back_in_the_mode_it_was_in(made, mode):
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(images()[0].numel(), 6).double())
    part = made(net.train(mode and made is rewritten))
    part.train(mode)
    for model in (part, nn.Sequential(part), lambda x: part(x)):
        before = part.code if made is rewritten else part.branch
        found = [attacked("pgd", model) for _ in range(2)]
        assert torch.equal(*found)  # without dropout
        with frozen(model), frozen(part):
            assert "True" not in part.code if made is rewritten else part.branch == "eval"
        assert (part.code if made is rewritten else part.branch) == before
        assert part.training


def test_a_train_put_on_a_module_is_called_both_ways():
    net, calls = training_net(), []
    net.train = lambda mode=True: calls.append(mode) or nn.Module.train(net, mode)
    attacked("pgd", net)
    assert calls == [False, True]
    assert all(part.training for part in net.modules())


@every
def test_a_model_made_in_inference_mode_is_attacked_as_any_other(name):
    net = training_net().double()
    expected = attacked(name, net)
    with torch.inference_mode():
        made = training_net().double()
        made.load_state_dict(net.state_dict())
        assert next(made.parameters()).is_inference()
        assert torch.equal(attacked(name, made), expected)
    assert torch.equal(attacked(name, made), expected)
    assert made.training
    assert all(parameter.requires_grad for parameter in made.parameters())


def test_tensors_made_in_inference_mode_that_cannot_be_copied_are_named():
    with torch.inference_mode():
        net, weights = training_net(), uniform(1, 6)
    with pytest.raises(ValueError, match=r"^pgd: `model` holds tensors that were made under torch\.inference_mode"):
        attacked("pgd", lambda x: net(x))
    assert all(parameter.requires_grad for parameter in net.parameters())
    with pytest.raises(ValueError, match=r"^pgd: `loss` holds tensors that were made under torch\.inference_mode"):
        attacked("pgd", training_net(), loss=lambda logits, labels: logits.amax(dim=1) * weights)


def interrupted_at(number, call):
    """Call something, and raise an interrupt at the so manieth line of the library's door."""
    lines = 0

    def trace(frame, event, argument):
        nonlocal lines
        if not frame.f_code.co_filename.endswith(("door.py", "frozen.py", "finding.py", "switching.py")):
            return None
        if event == "line":
            lines += 1
            if lines == number:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize("hidden", [False, True], ids=["module", "callable"])
def test_an_interrupt_at_any_line_leaves_the_model_as_found(hidden):
    net = training_net()
    model = (lambda x: net(x)) if hidden else net
    before, number = Picture(net), 1

    def borrow():
        with frozen(model) as f:
            f(images())

    while interrupted_at(number, borrow):
        before.assert_unchanged()
        assert not _HELD, number
        number += 1
    assert number > 50


def test_an_interrupt_at_any_line_of_an_attack_leaves_the_model_as_found():
    net, x, labels = training_net(), images(), classes_of()
    before, number = Picture(net), 1
    attack = functools.partial(pgd, net, x, labels, THREAT, steps=1, start="clean")
    while interrupted_at(number, attack):
        before.assert_unchanged()
        assert not _HELD, number
        number += 1
    assert number > 100
    before.assert_unchanged()


# What passes move ---------------------------------------------------------------------------------------------------


class Remembers(Net):
    """Keeps what it sees, in eval mode too: in place, by a new tensor, behind the back of torch, in another shape."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(images().shape[1:], dtype=torch.float64))
        self.register_buffer("largest", torch.zeros(()), persistent=False)
        self.register_buffer("smallest", torch.zeros(0))  # as an observer begins in quantization-aware training

    def forward(self, x):
        self.smallest.resize_(1).fill_(float(x.detach().min()))
        self.passes += 1
        self.average = 0.9 * self.average + 0.1 * x.detach().mean(dim=0)
        self.largest.data.fill_(float(x.detach().max()))
        return super().forward(x)


@every
def test_buffers_that_move_in_eval_mode_are_put_back(name):
    net = Remembers().train()
    net.dropout.p = 0.0
    before = Picture(net)
    attacked(name, net)
    attacked(name, lambda x: net(x))
    before.assert_unchanged()


@every
def test_statistics_that_an_export_in_train_mode_goes_on_with_are_put_back(name):
    net = Net().train()
    net.dropout.p = 0.0
    program = torch.export.export(net, (images(),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    for model in (program.module(), nn.Sequential(program.module())):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        attacked(name, model)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_measurements_put_buffers_back_and_training_does_not():
    net, x, labels = Remembers().train(), images(), classes_of()
    before = Picture(net)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            evaluate(net, [(x, labels)], {}, progress=False)
    sanity_checks(net, x, labels, THREAT, steps=2, queries=2)
    before.assert_unchanged()
    objectives.trades(net, (x,), labels, functools.partial(pgd, threat=THREAT, steps=1))
    assert int(net.passes) == 2  # the step's own: of the clean and of the adversarial images
    with frozen(net) as f:  # in which the caller may write what the passes are for
        f(x)
    assert int(net.passes) == 3


def test_buffers_are_put_back_by_the_last_of_several_borrowers():
    net, x, labels = Remembers(), images(), classes_of()
    terms = Terms(judged=False)
    outer, inner = (opened("pgd", net, x, labels, THREAT, terms) for _ in range(2))
    victim = outer.__enter__()
    victim.logits(x)
    other = inner.__enter__()
    other.logits(x)
    outer.__exit__(None, None, None)
    other.logits(x)
    inner.__exit__(None, None, None)
    assert int(net.passes) == 0


@pytest.mark.parametrize("way", ["pruned", "weight norm"])
def test_weights_that_hooks_compute_keep_their_history(way):
    net = training_net()
    if way == "pruned":
        prune.random_unstructured(net.last, "weight", amount=0.3)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an older form of it
            nn.utils.weight_norm(net.last)
    net(images())
    before = net.last.weight
    for name in ATTACKS:
        attacked(name, net)
    assert net.last.weight is before
    before.sum().backward()  # a penalty on the weights of the last pass


def test_cached_parametrizations_are_those_of_training():
    net = training_net()
    nn.utils.parametrizations.weight_norm(net.last)
    weights = {key: 2 * value for key, value in snapshot(net).items()}
    expected = call_with(net.eval(), weights, images())
    with nn.utils.parametrize.cached():
        x_adv = pgd(net.train(), images(), classes_of(), THREAT, steps=1)
        assert_close(call_with(net.eval(), weights, images()), expected)
        functional.cross_entropy(net.train()(x_adv), classes_of()).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_graph_that_only_goes_back_by_backward():
    net, x, labels = training_net(), images(), classes_of()
    expected = pgd(net, x, labels, THREAT, steps=2, start="clean")

    def model(x):
        logits = net(x)
        torch.autograd.graph.register_multi_grad_hook((x, logits), lambda grads: None)
        return logits

    assert_close(pgd(model, x, labels, THREAT, steps=2, start="clean"), expected, rtol=0, atol=1e-9)


NO_MODELS = {
    "a class": (Net, "got the class Net; make one of it first"),
    "a list of modules": (nn.ModuleList([nn.Flatten()]), "have a forward pass, and ModuleList has none"),
    "a dictionary of modules": (nn.ModuleDict({"a": nn.Flatten()}), "ModuleDict has none"),
    "a bare module": (nn.Module(), "and Module has none"),
}
TAKERS = {
    "pgd": lambda model, x, labels: pgd(model, x, labels, THREAT),
    "square": lambda model, x, labels: square(model, x, labels, THREAT, queries=2),
    "evaluate": lambda model, x, labels: evaluate(model, [(x, labels)], {}),
    "sanity_checks": lambda model, x, labels: sanity_checks(model, x, labels, THREAT),
    "trades": lambda model, x, labels: objectives.trades(model, (x,), labels, functools.partial(pgd, threat=THREAT)),
}


@pytest.mark.parametrize("name", TAKERS)
@pytest.mark.parametrize("kind", NO_MODELS)
def test_what_has_no_forward_pass_is_no_model(kind, name):
    model, message = NO_MODELS[kind]
    with pytest.raises(TypeError, match=f"^{name}: `model` must .*{message}"):
        TAKERS[name](model, images(), classes_of())


def test_a_forward_pass_may_be_put_on_a_module():
    model = nn.ModuleList([Net()])
    model.forward = lambda x: model[0](x)
    pgd(model, images(), classes_of(), THREAT, steps=1)


NO_LOGITS = {
    "integers": lambda z: (100 * z).long(),
    "truth values": lambda z: z > 0,
    "complex numbers": lambda z: z.to(torch.complex128),
    "sparse ones": lambda z: z.to_sparse(),
    "of another device": lambda z: z.to("meta"),
}


@pytest.mark.parametrize("name", ["pgd", "apgd", "fab", "square"])
@pytest.mark.parametrize("kind", NO_LOGITS)
def test_outputs_that_are_no_logits_are_refused_by_the_attack_that_was_called(kind, name):
    net = Net().eval()
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: .*`model\(x\)`"):
        attacked(name, lambda x: NO_LOGITS[kind](net(x)))


@pytest.mark.parametrize("name", ["pgd", "square"])
def test_attacks_are_not_mapped_or_differentiated(name):
    net = Net().eval()

    def one(x, label):
        return ATTACKS[name](net, x[None], label[None], THREAT)[0]

    with pytest.raises(TypeError, match=f"^{name}: an attack cannot be .*mapped by torch.func"):
        torch.func.vmap(one)(images(), classes_of())
    with pytest.raises(TypeError, match=f"^{name}: an attack cannot be differentiated"):
        torch.func.grad(lambda x: one(x, classes_of()[0]).sum())(images()[0])


# Twins --------------------------------------------------------------------------------------------------------------


class Settings(nn.Module):
    factor = 1.0

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5))
        self.scales, self.table, self.config = [1.0, 2.0], {"shift": 0.5}, types.SimpleNamespace(sign=1.0)
        self.mean, self.last = torch.zeros(5), torch.tanh

    def forward(self, x):
        out = self.layer(x) * self.factor * self.scales[1] + self.table["shift"] - self.mean
        return self.config.sign * self.last(out)


def set_class(model):
    type(model).factor = 3.0


CHANGES = {
    "hook added": lambda m: m.layer.register_forward_hook(lambda part, given, out: out * 3),
    "forward replaced": lambda m: vars(m).update(forward=lambda x: 3 * type(m).forward(m, x)),
    "forward of a part": lambda m: vars(m.layer[1]).update(forward=lambda x: 3 * nn.Linear.forward(m.layer[1], x)),
    "class attribute": set_class,
    "list": lambda m: m.scales.__setitem__(1, 7.0),
    "dictionary": lambda m: m.table.update(shift=4.0),
    "namespace": lambda m: setattr(m.config, "sign", -1.0),
    "tensor": lambda m: m.mean.add_(3.0),
    "function": lambda m: setattr(m, "last", torch.sin),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_after_a_lanes_first_call_counts(change, monkeypatch):
    monkeypatch.setattr(Settings, "factor", 1.0)
    model, x = Settings().eval(), uniform(0, 4, 12, dtype=torch.float32)
    with frozen(model, lane=Lane()) as f:
        f(x)
    CHANGES[change](model)
    with frozen(model, lane=Lane()) as f, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a hook may be none that can be traced
        assert_close(f(x), f.exact(x), rtol=1e-4, atol=1e-5)


def test_a_hook_that_was_removed_is_gone_from_the_twin():
    model, x = Settings().eval(), uniform(0, 4, 12, dtype=torch.float32)
    handle = model.layer.register_forward_hook(lambda part, given, out: out * 3)
    with frozen(model, lane=Lane()) as f, pytest.warns(UserWarning, match="forward hooks"):
        f(x)
    handle.remove()
    with frozen(model, lane=Lane()) as f:
        assert_close(f(x), f.exact(x), rtol=1e-4, atol=1e-5)


def test_a_twin_serves_one_borrower_at_a_time():
    model, x = Settings().eval(), uniform(0, 4, 12, dtype=torch.float32)
    with frozen(model, lane=Lane()) as first, frozen(model, lane=Lane()) as second:
        first(x), second(x)
        assert first._twin is not second._twin
    assert len(twins._TWINS[model][Lane()]) == 2


# What a victim answers ----------------------------------------------------------------------------------------------


def test_passes_are_counted():
    with opened("pgd", training_net(), images(), classes_of(), THREAT, Terms(functional.mse_loss)) as victim:
        loss = functools.partial(functional.cross_entropy, reduction="none")
        victim.gradient(victim.x, victim.labels, loss)
        victim.logits(victim.x)
        assert (victim.forwards, victim.gradients) == (2, 1)
        _, pull_back = victim.linearized(victim.x)
        pull_back(torch.ones(6, 5, dtype=torch.float64), last=False)
        pull_back(torch.ones(6, 5, dtype=torch.float64))
        assert (victim.forwards, victim.gradients) == (3, 3)


def root(x):
    """Infinite slopes at 0."""
    score = x.flatten(1).sqrt() @ torch.linspace(-1, 1, 12, dtype=x.dtype)
    return torch.stack([score, -score], dim=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "keep": "best"}], ids=str)
def test_infinite_gradients_are_followed(options, dtype):
    x = uniform(3, 40, 12, dtype=dtype)
    x[:, ::3] = 0
    labels = root(x).argmax(dim=1)
    found = pgd(root, x, labels, THREAT, start="clean", verdict=True, **options)
    plain = pgd(root, x, labels, THREAT, start="clean", verdict=True)
    assert plain.success.sum() > 10
    assert found.success.sum() >= plain.success.sum() - 2


def test_finite_gradients_that_are_huge_do_not_overflow():
    x, labels = uniform(0, 4, 12, dtype=torch.float32), torch.zeros(4, dtype=torch.long)

    def model(x):
        score = x.flatten(1).sum(dim=1) * 1e38
        return torch.stack([score, -score], dim=1)

    x_adv = pgd(model, x, labels, THREAT, momentum=0.9, start="clean", loss=lambda z, y: z[:, 1])
    assert (x_adv < x).all()


def test_rooms_may_look_at_a_victim():
    with opened("x", training_net(), images(), classes_of(), THREAT) as victim:
        assert inspection.passes_differ(victim, victim.x) == 0
        assert not inspection.gives_probabilities(victim.logits(victim.x))


# Objectives hand their attack on ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "attack", "message"),
    [
        ("trades", functools.partial(pgd, threat=THREAT, start="clean"), "trades: `attack` has a `start` of its own"),
        ("trades", functools.partial(pgd, threat=THREAT, loss=root), "trades: `attack` has a `loss` of its own"),
        ("mart", functools.partial(pgd, threat=THREAT, start="clean"), "mart: `attack` has a `start` of its own"),
        (
            "trades",
            functools.partial(cw, threat=THREAT),
            "trades: `attack` cannot be called as attack.*functools",
        ),
        ("pgd_at", pgd, "pgd_at: `attack` cannot be called as .*missing a required argument: 'threat'.*functools.part"),
    ],
)
def test_what_an_objective_would_override_is_refused(name, attack, message):
    with pytest.raises(TypeError, match=message):
        getattr(objectives, name)(training_net(), (images(),), classes_of(), attack)
