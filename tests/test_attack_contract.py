"""What every attack promises: where its result lies, and that it leaves the world as it found it.

A new attack adds one row and inherits these tests.
"""

import copy
import dataclasses
import inspect
import math
import random
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from perceptual_at import (
    L1,
    L2,
    Linf,
    Threat,
    apgd,
    auto_attack,
    cw,
    dlr,
    fab,
    fgsm,
    frozen,
    kl_to,
    margin,
    pgd,
    square,
)
from perceptual_at.attacks import surrogate_pgd
from perceptual_at.divergences import cross_entropy
from tests.passes import host_reads
from tests.strategies import (
    BOUNDS,
    DTYPES,
    clean_inputs,
    dtype_name,
    dtypes,
    generator,
    integers,
    normal,
    seeds,
    threats,
    uniform,
)

# The table --------------------------------------------------------------------------------------------------------


def kl_to_even(logits, labels):
    return kl_to(torch.zeros_like(logits))(logits, labels)


@dataclasses.dataclass
class Case:
    """An attack, and the passes it may spend."""

    name: str
    attack: Callable[..., torch.Tensor]
    gradients: int
    scorings: int = 0
    """Forward passes without a gradient."""
    draws: bool = True
    loss: Callable = cross_entropy

    def __call__(self, model, x, labels, **options):
        return self.attack(model, x, labels, **options)

    @property
    def threat(self):
        return self.attack.keywords["threat"]


LINF = Linf(0.1)
QUICK = [("apgd-ce", {"steps": 4}), ("apgd-t", {"steps": 4}), ("fab-t", {"steps": 4}), ("square", {"queries": 20})]
ATTACKS = [
    Case("pgd Linf", partial(pgd, threat=LINF, steps=3), 3),
    Case("pgd L2", partial(pgd, threat=L2(0.5), steps=3), 3),
    Case("pgd L2 clipped last", partial(pgd, threat=L2(0.5, projection="ball_box"), steps=3), 3),
    Case("pgd L1", partial(pgd, threat=L1(2.0), steps=3), 3),
    Case("pgd margin", partial(pgd, threat=LINF, steps=3, loss=margin), 3, loss=margin),
    Case("pgd dlr", partial(pgd, threat=LINF, steps=3, loss=dlr), 3, loss=dlr),
    Case("pgd kl_to", partial(pgd, threat=LINF, steps=3, loss=kl_to_even), 3, loss=kl_to_even),
    Case("pgd clean start", partial(pgd, threat=LINF, steps=3, start="clean"), 3, draws=False),
    Case("pgd keep best", partial(pgd, threat=LINF, steps=3, keep="best"), 3, 1),
    Case("pgd L2 keep best", partial(pgd, threat=L2(0.5), steps=3, keep="best"), 3, 1),
    Case("pgd restarts", partial(pgd, threat=LINF, steps=2, restarts=3), 6, 3),
    Case("pgd restarts keep best", partial(pgd, threat=L1(2.0), steps=2, restarts=2, keep="best"), 4, 2),
    Case("fgsm", partial(fgsm, threat=LINF), 1, draws=False),
    Case("fgsm random start", partial(fgsm, threat=L2(0.5), start="random"), 1),
    Case("pgd momentum", partial(pgd, threat=LINF, steps=3, momentum=0.9), 3),
    Case("pgd averaged passes", partial(pgd, threat=LINF, steps=2, eot=2), 4),
    Case("cw", partial(cw, threat=LINF, steps=3), 3, loss=margin),
]

# Attacks that look for one misclassified point per sample: decided samples leave, so passes depend on the data.
SEARCHES = [
    Case("pgd early stop", partial(pgd, threat=LINF, steps=3, keep="best", early_stop=True), 1, 0),
    Case("pgd L1 early stop", partial(pgd, threat=L1(2.0), steps=2, restarts=2, keep="best", early_stop=True), 1, 0),
    Case("apgd Linf", partial(apgd, threat=LINF, steps=4), 1),
    Case("apgd L2", partial(apgd, threat=L2(0.5), steps=4), 1),
    Case("apgd L1", partial(apgd, threat=L1(2.0), steps=4), 1),
    Case("apgd L1 from larger", partial(apgd, threat=L1(2.0), steps=9, from_larger_eps=True), 1),
    Case("apgd dlr", partial(apgd, threat=LINF, steps=4, loss=dlr, restarts=2), 1, loss=dlr),
    Case("apgd targets", partial(apgd, threat=LINF, steps=4, target_classes=2), 1, loss=margin),
    Case("apgd all steps", partial(apgd, threat=L2(0.5), steps=4, early_stop=False), 5, 1),
    Case("fab Linf", partial(fab, threat=LINF, steps=4), 1, draws=False, loss=margin),
    Case("fab L2", partial(fab, threat=L2(0.5), steps=4), 1, draws=False, loss=margin),
    Case("fab L1", partial(fab, threat=L1(2.0), steps=4), 1, draws=False, loss=margin),
    Case("fab targets", partial(fab, threat=LINF, steps=4, target_classes=2), 1, draws=False, loss=margin),
    Case("square Linf", partial(square, threat=LINF, queries=30), 0, loss=margin),
    Case("square L2", partial(square, threat=L2(0.5), queries=30), 0, loss=margin),
    Case("square L1", partial(square, threat=L1(2.0), queries=30), 0, loss=margin),
    Case("surrogate Linf", partial(surrogate_pgd, threat=LINF, steps=4, restarts=1, probes=2), 1, loss=margin),
    Case("surrogate L1", partial(surrogate_pgd, threat=L1(2.0), steps=4, target_classes=1, probes=2), 1, loss=margin),
    Case("auto_attack", partial(auto_attack, threat=L2(0.5), version=QUICK), 4, loss=margin),
]


def every(cases):
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases])


every_attack = every(ATTACKS)
every_call = every([*ATTACKS, *SEARCHES])
# A search in Linf may end in the same corners from anywhere.
every_attack_that_differs = every(
    [*[c for c in ATTACKS if c.draws], *[c for c in SEARCHES if c.draws and not isinstance(c.threat, Linf)]]
)
every_fixed_attack = every([case for case in ATTACKS if not case.draws])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


class Net(nn.Module):
    """Batch norm, dropout and a smooth activation; weights from a seed of their own."""

    def __init__(self, *, classes=5, entries=12, dtype=torch.float64):
        super().__init__()
        self.first, self.norm = nn.Linear(entries, 8), nn.BatchNorm1d(8)
        self.dropout, self.last = nn.Dropout(0.5), nn.Linear(8, classes)
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(normal(100 + i, *parameter.shape))
        self.to(dtype)

    def forward(self, x):
        return self.last(self.dropout(torch.tanh(self.norm(self.first(x.flatten(1))))))


def images(batch=6, dtype=torch.float64, seed=0):
    return clean_inputs(seed, (batch, 3, 2, 2), (0.0, 1.0), dtype)


def classes_of(batch=6, classes=5):
    return integers(1, batch, below=classes)


@pytest.fixture
def model():
    """Mid-training: in train mode but for one frozen batch norm, one frozen layer, some gradients stored."""
    net = Net().train()
    net.norm.eval()
    net.last.weight.requires_grad_(False)
    net.first.weight.grad = normal(8, *net.first.weight.shape)
    return net


class Picture:
    """Everything of a model that an attack must leave alone."""

    def __init__(self, model):
        self.model = model
        self.modes = [(name, module.training) for name, module in model.named_modules()]
        self.parameters = [
            (p, p.requires_grad, p.detach().clone(), p.data_ptr(), p.grad, None if p.grad is None else p.grad.clone())
            for p in model.parameters()
        ]
        self.buffers = [(b, b.clone()) for b in model.buffers()]
        self.hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    def assert_unchanged(self, *, buffers=True):
        now = Picture(self.model)
        assert now.modes == self.modes
        assert now.hooks == self.hooks
        for before, after in zip(self.parameters, now.parameters, strict=True):
            assert after[0] is before[0], "another parameter"
            assert after[1] == before[1], "requires_grad"
            assert torch.equal(after[2], before[2]), "value"
            assert after[3] == before[3], "storage"
            assert after[4] is before[4], "another .grad"
            assert before[5] is None or torch.equal(after[5], before[5]), ".grad"
        for before, after in zip(self.buffers, now.buffers, strict=True):
            assert after[0] is before[0], "another buffer"
            assert not buffers or torch.equal(after[1], before[1]), "buffer"


def random_states():
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002


def assert_allowed(threat, x_adv, x):
    """In ball and box with no tolerance, whatever dtype the difference is taken in."""
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    for dtype in {x.dtype, torch.promote_types(x.dtype, torch.float32), torch.float64}:
        assert (threat.norm(x_adv.to(dtype) - x.to(dtype)).double() <= threat.eps).all(), dtype
    assert (x_adv.double() >= threat.bounds[0]).all()
    assert (x_adv.double() <= threat.bounds[1]).all()


# Where the result lies --------------------------------------------------------------------------------------------


@pytest.mark.slow
@every_call
@every_dtype
def test_the_result_is_inside_ball_and_box_exactly(case, dtype):
    x, labels = images(dtype=dtype), classes_of()
    net = Net(dtype=dtype)
    for seed in range(3):
        options = {"generator": generator(seed)} if case.draws else {}
        x_adv = case(net, x, labels, **options)
        assert_allowed(case.threat, x_adv, x)
        assert not torch.equal(x_adv, x)


@given(threats(), seeds, dtypes, st.sampled_from(["random", "clean"]), st.integers(1, 4), st.floats(0.01, 20.0))
def test_any_threat_and_step_size_stay_inside(threat, seed, dtype, start, steps, stride):
    x = clean_inputs(seed, (3, 2, 3), threat.bounds, dtype)
    weight = normal(seed + 1, 6, dtype=dtype)

    def model(x):
        score = (x.flatten(1) / 8 * weight).sum(dim=1).tanh()
        return torch.stack([score, -score], dim=1)

    x_adv = pgd(
        model, x, integers(seed, 3, below=2), threat,
        steps=steps, step_size=stride * threat.eps, start=start, generator=generator(seed),
    )  # fmt: skip
    assert_allowed(threat, x_adv, x)


@every([case for case in ATTACKS if case.attack.func is pgd and case.attack.keywords.get("restarts", 1) == 1])
@every_dtype
def test_a_start_outside_is_brought_inside(case, dtype):
    x = images(dtype=dtype)
    for scale in (1e-3, 5.0):
        x_adv = case(Net(dtype=dtype), x, classes_of(), start=x + normal(4, *x.shape, scale=scale, dtype=dtype))
        assert_allowed(case.threat, x_adv, x)


@every_attack
@every_dtype
def test_the_model_sees_allowed_points_and_the_result_is_one_of_them(case, dtype):
    x, seen = images(dtype=dtype), []

    class Watched(Net):
        def forward(self, x):
            seen.append(x.detach().clone())
            return super().forward(x)

    x_adv = case(Watched(dtype=dtype), x, classes_of())
    for point in seen:
        assert_allowed(case.threat, point, x)
    if case.scorings:  # chosen by loss, so its loss was seen
        for sample, *candidates in zip(x_adv, *seen, strict=True):
            assert any(torch.equal(sample, candidate) for candidate in candidates)


@every_attack
def test_the_loss_rises(case):
    x, labels = images(batch=20), classes_of(20)
    net = Net().eval()
    x_adv = case(net, x, labels, **({"generator": generator(0)} if case.draws else {}))
    before, after = (case.loss(net(z), labels).mean() for z in (x, x_adv))
    assert after > before + 0.05


# Randomness -------------------------------------------------------------------------------------------------------


@every_attack_that_differs
def test_a_generator_makes_the_attack_repeatable(case, model):
    x, labels = images(), classes_of()
    first, again, other = (case(model, x, labels, generator=generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@every_attack_that_differs
def test_without_a_generator_attacks_differ(case, model):
    x, labels = images(), classes_of()
    assert not torch.equal(case(model, x, labels), case(model, x, labels))


@every_attack_that_differs
def test_without_a_generator_the_global_seed_decides(case, model):
    x, labels = images(), classes_of()
    with torch.random.fork_rng(devices=[]):
        results = []
        for seed in (333, 111, 222, 111):  # the stream starts anew whenever the seed is another one
            torch.manual_seed(seed)
            results.append(case(model, x, labels))
    assert torch.equal(results[1], results[3])
    assert not torch.equal(results[1], results[2])


@every_call
@pytest.mark.parametrize("with_generator", [True, False])
def test_global_random_states_are_untouched(case, model, with_generator):
    before = random_states()
    case(model, images(), classes_of(), **({"generator": generator(0)} if with_generator else {}))
    assert random_states() == before


@every_fixed_attack
def test_an_attack_from_the_clean_input_draws_nothing(case, model):
    x, labels = images(), classes_of()
    assert torch.equal(case(model, x, labels), case(model, x, labels))


# The model is left as found ---------------------------------------------------------------------------------------


@every_call
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_found(case, model, training):
    if not training:
        model.eval()
        model.norm.train()
    before = Picture(model)
    case(model, images(), classes_of())
    before.assert_unchanged()


class Stumbles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("the backward pass stumbled")


STUMBLES = [
    pytest.param(case, where, id=f"{where}-{case.name}")
    for case in [*ATTACKS, *SEARCHES]
    for where in ("forward", "backward", "loss")
    if (where != "backward" or case.gradients)
    and (where != "loss" or "loss" in inspect.signature(case.attack.func).parameters)
]


@pytest.mark.parametrize(("case", "where"), STUMBLES)
def test_the_model_is_left_as_found_when_it_raises_in_the_middle(case, model, where):
    calls = []

    def last_call():
        calls.append(torch.is_grad_enabled())  # scoring passes have no backward
        return sum(calls) == case.gradients

    def stumbling_loss(logits, labels, *targets):
        if last_call():
            raise RuntimeError("the loss stumbled")
        return case.loss(logits, labels)

    class Stumbling(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            if where == "loss" or not last_call():
                return self.inner(x)
            if where == "forward":
                self.inner(x)
                raise RuntimeError("the forward pass stumbled")
            return Stumbles.apply(self.inner(x))

    stumbling = Stumbling().train(model.training)
    model.norm.eval()
    before, states, mode = Picture(stumbling), random_states(), torch.is_grad_enabled()
    options = {"loss": stumbling_loss} if where == "loss" else {}
    with pytest.raises(RuntimeError, match="stumbled"):
        case(stumbling, images(), classes_of(), **options)
    before.assert_unchanged()
    assert random_states() == states
    assert torch.is_grad_enabled() == mode


@every_call
def test_the_model_is_left_as_found_after_refused_arguments(case, model):
    before = Picture(model)
    refused = [(images() + 9, classes_of()), (images(), classes_of(3))]
    if case.loss is not kl_to_even:  # what labels mean to a loss of the user's own is its own affair
        refused.append((images(), classes_of() + 40))
    for x, labels in refused:
        with pytest.raises(ValueError, match=r"`(x|labels)`"):
            case(model, x, labels)
    before.assert_unchanged()


@every_call
def test_the_model_is_attacked_in_eval_mode_with_frozen_parameters(case, model):
    modes = []
    model.first.register_forward_hook(
        lambda *_: modes.append(
            (any(m.training for m in model.modules()), any(p.requires_grad for p in model.parameters()))
        )
    )
    x, labels = images(), classes_of()
    result = case(model, x, labels, **({"generator": generator(0)} if case.draws else {}))
    assert set(modes) == {(False, False)}
    expected = case(copy.deepcopy(model).eval(), x, labels, **({"generator": generator(0)} if case.draws else {}))
    assert torch.equal(result, expected)


@every_attack
def test_a_model_kept_in_train_mode_moves_its_batch_norm_and_nothing_else(case, model):
    model.train()
    model.dropout.eval()  # so that the attack draws nothing of its own
    before, batches = Picture(model), model.norm.num_batches_tracked.item()
    case(model, images(), classes_of(), model_mode="as_is")
    before.assert_unchanged(buffers=False)
    assert model.norm.num_batches_tracked.item() == batches + case.gradients + case.scorings
    assert not torch.equal(model.norm.running_mean, before.buffers[0][1])


@every_call
def test_a_frozen_batch_norm_stays_frozen_when_the_model_is_kept(case, model):
    model.train()
    for module in (model.norm, model.dropout):
        module.eval()
    before = Picture(model)
    case(model, images(), classes_of(), model_mode="as_is")
    before.assert_unchanged()


@every_call
def test_arguments_are_left_as_found(case, model):
    x, labels = images().requires_grad_(), classes_of()
    history = x * 1.0  # not a leaf
    before = x.detach().clone(), labels.clone(), x._version, labels._version
    for given_x in (x, history):
        x_adv = case(model, given_x, labels)
        assert not x_adv.requires_grad
        assert x_adv.data_ptr() != x.data_ptr()
    assert torch.equal(x, before[0])
    assert torch.equal(labels, before[1])
    assert (x._version, labels._version) == before[2:]
    assert x.requires_grad
    assert x.grad is None


@every([case for case in ATTACKS if case.attack.keywords.get("restarts", 1) == 1])
def test_a_start_tensor_is_left_as_found(case, model):
    x = images()
    start = (x + 0.01).requires_grad_()
    before = start.detach().clone()
    x_adv = case(model, x, classes_of(), start=start)
    x_adv += 1  # nor does the result share its memory
    assert torch.equal(start, before)
    assert start.grad is None


@every_call
def test_training_goes_on_after_an_attack(case):
    net, reference = Net().train(), Net().train()
    for module in (net.dropout, reference.dropout):
        module.p = 0.0
    x, labels = images(), classes_of()
    case(net, x, labels)
    for module in (net, reference):
        functional.cross_entropy(module(x), labels).backward()
    for ours, theirs in zip(net.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@every_call
def test_a_callable_that_holds_a_module_is_attacked_as_the_module_is(case, model):
    x, labels = images(), classes_of()
    before = Picture(model)
    options = [{"generator": generator(5)} if case.draws else {} for _ in range(2)]
    hidden = case(lambda x: model(x), x, labels, **options[0])
    before.assert_unchanged()
    assert torch.equal(hidden, case(model, x, labels, **options[1]))


@every_attack
def test_a_callable_whose_module_cannot_be_found_is_called_as_it_is_with_a_warning(case, model):
    model.train()
    model.dropout.eval()
    before, batches = Picture(model), model.norm.num_batches_tracked.item()
    hidden = iter([model] * 100)  # as good as any other way to hide it
    with pytest.warns(
        UserWarning, match=r"`model` runs modules in train mode that could not be found in it \(BatchNorm1"
    ):
        case(lambda x: next(hidden)(x), images(), classes_of())
    before.assert_unchanged(buffers=False)  # no parameter gradient is stored
    assert model.norm.num_batches_tracked.item() == batches + case.gradients + case.scorings


# Where attacks are called from ------------------------------------------------------------------------------------


@every_call
@pytest.mark.parametrize("context", ["no_grad", "inference_mode"])
def test_attacks_work_where_gradients_are_off(case, model, context):
    options = {"generator": generator(5)} if case.draws else {}
    expected = case(model, images(), classes_of(), **options)
    options = {"generator": generator(5)} if case.draws else {}
    before = Picture(model)
    with getattr(torch, context)():
        x, labels = images(), classes_of()  # inference tensors, in inference mode
        assert x.is_inference() == (context == "inference_mode")
        x_adv = case(model, x, labels, **options)
        assert torch.is_inference_mode_enabled() == (context == "inference_mode")
        assert not torch.is_grad_enabled()
    assert torch.equal(x_adv, expected)
    before.assert_unchanged()


@every([case for case in ATTACKS if case.attack.keywords.get("restarts", 1) == 1 and case.attack.func is not cw])
def test_starts_and_references_may_be_made_in_inference_mode(case, model):
    with torch.inference_mode():
        x, labels = images(), classes_of()
        start, reference = x + 0.01, normal(3, 6, 5)
        loss = kl_to(reference)
    x_adv = case(model, x, labels, start=start, loss=loss)
    assert_allowed(case.threat, x_adv, x)


@every_call
def test_attacks_work_under_autocast(case):
    net, x, labels = Net(dtype=torch.float32).train(), images(dtype=torch.float32), classes_of()
    before, seen = Picture(net), []
    handle = net.last.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        x_adv = case(net, x, labels)
    handle.remove()
    assert set(seen) == {torch.bfloat16}
    assert_allowed(case.threat, x_adv, x)
    assert not torch.equal(x_adv, x)
    before.assert_unchanged()


@every_call
@pytest.mark.parametrize("validate", [True, False])
def test_an_empty_batch_comes_back_empty(case, model, validate):
    before = Picture(model)
    x_adv = case(model, images(batch=0), classes_of(0), validate=validate)
    assert x_adv.shape == (0, 3, 2, 2)
    assert x_adv.dtype == torch.float64
    before.assert_unchanged()


@every_call
def test_memory_layout_does_not_matter(case, model):
    x, labels = images(), classes_of()
    options = [{"generator": generator(5)} if case.draws else {} for _ in range(3)]
    expected = case(model, x, labels, **options[0])
    channels_last = x.contiguous(memory_format=torch.channels_last)
    expanded = x[:1].expand_as(x)
    assert_close(case(model, channels_last, labels, **options[1]), expected, rtol=0, atol=1e-12)
    assert_allowed(case.threat, case(model, expanded, labels, **options[2]), expanded)


@every_call
@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 7), (4, 2, 3, 2, 2)], ids=str)
def test_samples_may_have_any_shape(case, shape):
    x = uniform(0, *shape)
    net = Net(entries=max(1, x[0].numel()))

    def model(x):
        return net(x.reshape(len(x), -1))

    net.eval()
    if case.attack.func in (square, auto_attack) and x.ndim != 4:  # random search wants images
        with pytest.raises(ValueError, match="must be images of shape"):
            case(model, x, classes_of(4))
        return
    assert_allowed(case.threat, case(model, x, classes_of(4)), x)


@pytest.mark.slow
@every([case for case in ATTACKS if case.name in ("pgd Linf", "pgd restarts keep best", "fgsm")])
def test_a_compiled_module_can_be_attacked_and_trained_afterwards(case):
    torch._dynamo.reset()
    net = Net().train()
    net.dropout.p = 0.0
    compiled, x, labels = torch.compile(net, backend="eager"), images(), classes_of()
    options = [{"generator": generator(5)} if case.draws else {} for _ in range(2)]
    before = Picture(compiled)
    x_adv = case(compiled, x, labels, **options[0])
    before.assert_unchanged()
    assert_close(x_adv, case(net, x, labels, **options[1]), rtol=0, atol=1e-12)
    functional.cross_entropy(compiled(x), labels).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert net.norm.num_batches_tracked == 1  # by the training pass


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_a_distributed_module_can_be_attacked_and_trained_afterwards(process_group, compiled):
    torch._dynamo.reset()
    net = Net().train()
    net.dropout.p = 0.0
    wrapped, x, labels = nn.parallel.DistributedDataParallel(net), images(), classes_of()
    wrapped = torch.compile(wrapped, backend="eager") if compiled else wrapped
    for case in ATTACKS:
        options = [{"generator": generator(5)} if case.draws else {} for _ in range(2)]
        before = Picture(wrapped)
        x_adv = case(wrapped, x, labels, **options[0])
        before.assert_unchanged()
        assert_close(x_adv, case(net, x, labels, **options[1]), rtol=0, atol=1e-12)
    for _ in range(2):  # its gradient buckets are ready for another round
        functional.cross_entropy(wrapped(x), labels).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("classes", [2, 3, 4, 10, 1000])
@every([case for case in ATTACKS if case.threat is LINF and case.attack.func is pgd])
def test_any_number_of_classes_will_do(case, classes):
    net, x, labels = Net(classes=classes).eval(), images(), classes_of(classes=classes)
    x_adv = case(net, x, labels)
    assert_allowed(case.threat, x_adv, x)
    assert case.loss(net(x_adv), labels).isfinite().all()
    assert not torch.equal(x_adv, x)


# What it costs ----------------------------------------------------------------------------------------------------


class Counted(torch.autograd.Function):
    """A product that notes which gradients its backward pass was asked for."""

    @staticmethod
    def forward(ctx, x, weight, asked):
        ctx.save_for_backward(x, weight)
        ctx.asked = asked
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        ctx.asked.append(ctx.needs_input_grad[:2])
        x, weight = ctx.saved_tensors
        return grad @ weight.t(), x.t() @ grad, None


class CountingNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(normal(0, 12, 5))
        self.forwards, self.asked = 0, []

    def forward(self, x):
        self.forwards += 1
        return Counted.apply(x.flatten(1), self.weight, self.asked)


@every_attack
def test_passes_are_as_many_as_promised_and_parameters_get_none(case):
    net = CountingNet()
    case(net, images(), classes_of())
    assert net.forwards == case.gradients + case.scorings
    assert net.asked == [(True, False)] * case.gradients  # (input, parameter)
    assert net.weight.grad is None


@every_attack
def test_values_are_read_once_for_validation_and_never_without(case, model):
    x, labels = images(), classes_of()
    for validate, waits in ((True, 1), (False, 0)):
        with host_reads() as reads:
            case(model, x, labels, validate=validate)
        assert len(reads) == waits, reads


# One sample at a time ---------------------------------------------------------------------------------------------


class Pointwise(nn.Module):
    """Logits by elementwise products and sums, whose bits do not depend on the size of the batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(normal(0, 5, 12))

    def forward(self, x):
        return (x.flatten(1)[:, None] * self.weight).tanh().sum(dim=2)


@every([case for case in ATTACKS if case.attack.func is fgsm or case.attack.keywords.get("restarts", 1) == 1])
def test_a_batch_attacked_whole_equals_the_batch_attacked_in_parts(case):
    x, labels = images(7), classes_of(7)
    whole = case(Pointwise(), x, labels, start="clean")
    for size in (1, 2, 3):
        parts = zip(x.split(size), labels.split(size), strict=True)
        assert torch.equal(torch.cat([case(Pointwise(), *part, start="clean") for part in parts]), whole)
    order = torch.tensor([6, 2, 0, 5, 1, 4, 3])
    assert torch.equal(case(Pointwise(), x[order], labels[order], start="clean"), whole[order])


def test_the_loss_is_summed_over_the_batch_not_averaged():
    # the gradient of each sample is the smallest number of float32: half of it would be zero
    smallest = torch.tensor(1.4e-45)
    assert smallest > 0
    assert smallest / 2 == 0
    x = torch.full((4, 1), 0.5)
    x_adv = pgd(
        lambda x: torch.cat([x, -x], dim=1), x, torch.zeros(4, dtype=torch.long), LINF,
        steps=1, start="clean", loss=lambda logits, labels: logits[:, 1] * smallest,
    )  # fmt: skip
    assert (x_adv < 0.5).all()


@every_fixed_attack
def test_a_saturated_sample_does_not_disturb_its_neighbours(case):
    x, labels = images(), classes_of()

    def model(x):
        logits = Pointwise()(x)
        return torch.where(torch.arange(len(x))[:, None] == 2, logits * 0 + 1e6 * functional.one_hot(labels, 5), logits)

    x_adv, undisturbed = case(model, x, labels), case(Pointwise(), x, labels)
    others = torch.arange(6) != 2
    assert torch.equal(x_adv[2], x[2])  # its gradient is zero
    assert torch.equal(x_adv[others], undisturbed[others])


# Broken numbers ---------------------------------------------------------------------------------------------------


def root(x):
    """Logits whose gradient is 0 * inf at the origin."""
    length = x.flatten(1).square().sum(dim=1).sqrt()
    return torch.stack([-length, length], dim=1)


@every([case for case in ATTACKS if case.attack.keywords.get("restarts", 1) == 1])
def test_an_undefined_gradient_leaves_the_sample_in_place(case):
    x = torch.cat([torch.zeros(1, 3, 2, 2, dtype=torch.float64), 0.25 + images(2) / 2])
    labels = torch.ones(3, dtype=torch.long)
    x_adv = case(root, x, labels, start="clean")
    assert torch.equal(x_adv[0], x[0])
    assert (x_adv[1:] != x[1:]).any(dim=(1, 2, 3)).all()
    assert_allowed(case.threat, x_adv, x)


@pytest.mark.slow
@every_call
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_logits_that_are_not_finite_never_reach_the_result(case, value):
    def broken(x):
        logits = Pointwise()(x)
        return torch.where(torch.arange(len(x))[:, None] < 3, logits * value, logits)

    x = images()
    x_adv = case(broken, x, classes_of())
    assert x_adv.isfinite().all()
    assert_allowed(case.threat, x_adv, x)


def test_an_undefined_loss_never_wins():
    def undefined_where_it_moved(logits, labels):
        return torch.where(logits[:, 0] > 0.5, float("nan"), logits[:, 0])

    x = torch.full((2, 1), 0.4)
    x_adv = pgd(
        lambda x: torch.cat([x, -x], dim=1), x, torch.zeros(2, dtype=torch.long), Linf(0.3),
        steps=4, step_size=0.07, start="clean", keep="best", loss=undefined_where_it_moved,
    )  # fmt: skip
    assert_close(x_adv, torch.full((2, 1), 0.47))


def test_an_undefined_loss_at_the_start_gives_way_to_any_other():
    def undefined_where_it_started(logits, labels):
        return torch.where(logits[:, 0] < 0.45, float("nan"), 0.0) + logits[:, 0]

    x = torch.full((2, 1), 0.4)
    x_adv = pgd(
        lambda x: torch.cat([x, -x], dim=1), x, torch.zeros(2, dtype=torch.long), Linf(0.3),
        steps=2, step_size=0.1, start="clean", keep="best", loss=undefined_where_it_started,
    )  # fmt: skip
    assert_close(x_adv, torch.full((2, 1), 0.6))


# What the options mean --------------------------------------------------------------------------------------------


def test_the_default_step_size_is_two_and_a_half_budgets_over_the_steps():
    x, labels = images(), classes_of()
    for threat in (LINF, L2(0.5), L1(2.0)):
        default = pgd(Net(), x, labels, threat, steps=4, start="clean")
        assert torch.equal(
            default, pgd(Net(), x, labels, threat, steps=4, start="clean", step_size=2.5 * threat.eps / 4)
        )
    assert math.isclose(2.5 * (8 / 255) / 10, 2 / 255)  # the papers' setting


def test_ten_steps_are_the_default():
    net = CountingNet()
    pgd(net, images(), classes_of(), LINF)
    assert net.forwards == 10


def test_fgsm_is_one_full_step_from_the_clean_input():
    x, labels = images(), classes_of()
    for threat in (LINF, L2(0.5), L1(2.0)):
        step = pgd(Net(), x, labels, threat, steps=1, step_size=threat.eps, start="clean")
        assert torch.equal(fgsm(Net(), x, labels, threat), step)


@given(seeds, st.sampled_from([LINF, L2(0.5), L1(2.0)]), st.sampled_from([0.3, 1.0, 4.0]))
def test_the_best_iterate_is_no_worse_than_the_last_or_the_start(seed, threat, stride):
    net, x, labels = Net().eval(), images(seed=seed), classes_of()
    options = {"steps": 3, "step_size": stride * threat.eps, "start": "clean"}
    best, last = (pgd(net, x, labels, threat, keep=keep, **options) for keep in ("best", "last"))
    losses = [cross_entropy(net(z), labels) for z in (best, last, x)]
    assert (losses[0] >= losses[1]).all()
    assert (losses[0] >= losses[2]).all()


def test_the_best_iterate_can_be_any_of_them():
    # a hill at 0.5 that is walked over: up in steps of 0.1, then down
    def hill(logits, labels):
        return -(logits[:, 0] - 0.5).square()

    x = torch.tensor([[0.4], [0.3], [0.5]])
    options = {"steps": 1, "step_size": 0.2, "start": "clean", "loss": hill}
    model, labels = lambda x: torch.cat([x, -x], dim=1), torch.zeros(3, dtype=torch.long)
    assert_close(pgd(model, x, labels, Linf(0.3), keep="last", **options), torch.tensor([[0.6], [0.5], [0.5]]))
    assert_close(pgd(model, x, labels, Linf(0.3), keep="best", **options), torch.tensor([[0.4], [0.5], [0.5]]))


def test_a_start_outside_the_ball_is_never_the_best():
    def prefers_far_away(logits, labels):
        return (logits[:, 0] - 0.5).square()

    x = torch.full((1, 1), 0.5)
    x_adv = pgd(
        lambda x: torch.cat([x, -x], dim=1), x, torch.zeros(1, dtype=torch.long), LINF,
        steps=1, start=x + 0.4, keep="best", loss=prefers_far_away,
    )  # fmt: skip
    assert_close(x_adv, torch.full((1, 1), 0.6))


@given(seeds)
def test_restarts_are_no_worse_than_each_single_start(seed):
    net, x, labels = Net().eval(), images(seed=seed), classes_of()
    shared = generator(seed)
    singles = [pgd(net, x, labels, LINF, steps=2, generator=shared) for _ in range(3)]
    together = pgd(net, x, labels, LINF, steps=2, restarts=3, generator=generator(seed))
    losses = torch.stack([cross_entropy(net(z), labels) for z in singles])
    assert_close(cross_entropy(net(together), labels), losses.amax(dim=0), rtol=1e-12, atol=0)


def test_labels_may_be_probabilities():
    x, labels = images(), classes_of()
    hard = functional.one_hot(labels, 5).double()
    for dtype in (torch.float64, torch.float32):
        result = pgd(Net(), x, hard.to(dtype), LINF, start="clean")
        assert_close(result, pgd(Net(), x, labels, LINF, start="clean"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=dtype_name)
@pytest.mark.parametrize("loss", [cross_entropy, margin, dlr])
def test_labels_may_be_of_any_integer_dtype(dtype, loss):
    x, labels = images(), classes_of()
    results = [pgd(Net(), x, y, LINF, start="clean", loss=loss) for y in (labels, labels.to(dtype))]
    assert torch.equal(*results)


class CentralPatch:
    """A threat model of a user's own: anything may happen in the first two entries, nothing elsewhere."""

    eps = 1.0

    def allowed(self, x):
        return (torch.arange(x[0].numel()) < 2).reshape(x.shape[1:])

    def project(self, x_adv, x):
        return torch.where(self.allowed(x), x_adv.clamp(0, 1), x)

    def steepest(self, grad):
        return grad.sign()

    def random_start(self, x, *, generator=None):
        return self.project(torch.rand(x.shape, generator=generator, dtype=x.dtype), x)

    def norm(self, delta):
        return delta.flatten(1).abs().amax(dim=1)

    def scaled(self, factor):
        return self


def test_a_threat_model_of_ones_own_needs_five_methods():
    assert isinstance(CentralPatch(), Threat)
    x, labels = images(), torch.zeros(6, dtype=torch.long)
    weight = normal(2, 12)

    def model(x):
        score = (x.flatten(1) * weight).sum(dim=1)
        return torch.stack([score, -score], dim=1)

    expected = x.flatten(1).clone()
    expected[:, :2] = (weight[:2] < 0).double()
    for start in ("clean", "random"):
        x_adv = pgd(model, x, labels, CentralPatch(), start=start, keep="best", restarts=1 + (start == "random"))
        assert torch.equal(x_adv.flatten(1), expected)


@pytest.mark.parametrize("box", BOUNDS, ids=str)
@every_dtype
def test_validation_accepts_every_input_inside_the_bounds(box, dtype):
    x = clean_inputs(0, (4, 12), box, dtype)
    net = Net(dtype=dtype)
    assert_allowed(Linf(0.25, bounds=box), pgd(net, x, classes_of(4), Linf(0.25, bounds=box), steps=1), x)


# Frozen -----------------------------------------------------------------------------------------------------------


def test_frozen_models_can_be_frozen_again(model):
    before = Picture(model)
    with frozen(model) as outer, frozen(outer, model_mode="as_is") as inner, frozen(inner):
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(m.training for m in model.modules())
    before.assert_unchanged()


def test_frozen_hands_other_callables_back():
    def model(x):
        return x

    with frozen(model) as f:
        assert f is model


def test_frozen_looks_through_callables(model):
    before = Picture(model)
    with frozen(lambda x: model(x)):
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(m.training for m in model.modules())
    before.assert_unchanged()


@pytest.mark.parametrize("model_mode", ["eval", "as_is"])
def test_frozen_restores_after_an_exception(model, model_mode):
    before = Picture(model)
    with pytest.raises(KeyError), frozen(model, model_mode=model_mode):
        raise KeyError
    before.assert_unchanged()


def test_shared_and_lazily_nested_modules_are_restored_too():
    part = nn.BatchNorm1d(3).eval()
    net = nn.Sequential(part, nn.Sequential(part, nn.Dropout()), nn.ModuleList([part])).train()
    part.eval()
    before = Picture(net)
    with frozen(net):
        assert not any(m.training for m in net.modules())
    before.assert_unchanged()
