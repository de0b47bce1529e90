"""`pure_pgd`: the bits of `pgd`, in one graph, over many starts."""

import functools
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from perceptual_at import L1, L2, Lane, Linf, dlr, frozen, kl_to, margin, pgd, pure_pgd, targeted_dlr
from perceptual_at.divergences import cross_entropy
from tests.passes import Cost, cost
from tests.strategies import (
    DTYPES,
    clean_inputs,
    dtype_name,
    dtypes,
    generator,
    integers,
    normal,
    seeds,
    shapes,
    threats,
    uniform,
)
from tests.test_attack_contract import CentralPatch, Net, Pointwise, classes_of, images
from tests.test_passes import BATCH, problem

EACH = torch.tensor([0.02, 0.05, 0.1, 0.15, 0.2, 0.3])
THREATS = {
    "Linf": Linf(0.1), "Linf of each": Linf(EACH), "L2": L2(0.5), "L2 clipped last": L2(0.5, projection="ball_box"),
    "L2 of each": L2(EACH), "L1": L1(2.0), "L1 of each": L1(10 * EACH), "of the user's own": CentralPatch(),
}  # fmt: skip
every_threat = pytest.mark.parametrize("threat", THREATS.values(), ids=THREATS)
RELEASE = tuple(int(number) for number in torch.__version__.split("+")[0].split(".")[:2])
recent = pytest.mark.skipif(RELEASE < (2, 15), reason="older versions of torch compile and transform less of it")


def both(model, x, labels, threat, start, **options):
    """The two attacks from one start."""
    with frozen(model) as f:
        pure = pure_pgd(f, x, labels, threat, start, **options)
    return pure, pgd(model, x, labels, threat, start=start, validate=False, **options)


def starts_of(threat, x, count=3):
    return torch.stack([threat.random_start(x, generator=generator(seed)) for seed in range(count)])


# The same numbers -------------------------------------------------------------------------------------------------


@given(seeds, shapes, threats(), dtypes, st.integers(1, 4))
def test_it_returns_the_bits_of_pgd(seed, shape, threat, dtype, steps):
    x, far = (clean_inputs(s, shape, threat.bounds, dtype) for s in (seed, seed + 1))
    start = threat.project(far, x) if seed % 2 else far  # a given start may be outside the ball
    pure, expected = both(Net(entries=x[0].numel(), dtype=dtype), x, classes_of(shape[0]), threat, start, steps=steps)
    assert pure.dtype == dtype
    assert torch.equal(pure, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@every_threat
def test_it_returns_the_bits_of_pgd_for_every_threat_and_precision(threat, dtype):
    x = images(dtype=dtype)
    assert torch.equal(*both(Net(dtype=dtype), x, classes_of(), threat, threat.random_start(x), steps=3))


PROBABILITIES = normal(0, 6, 5).softmax(dim=1)
OPTIONS = {
    "step size": {"step_size": 0.03},
    "step sizes of each": {"step_size": EACH / 4},
    "margin": {"loss": margin},
    "dlr": {"loss": dlr},
    "kl_to": {"loss": kl_to(PROBABILITIES)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_takes_the_options_of_pgd(options):
    x = images()
    assert torch.equal(*both(Net(), x, classes_of(), Linf(0.1), x, **options))
    assert not torch.equal(both(Net(), x, classes_of(), Linf(0.1), x, **options)[0], x)


def test_labels_may_be_probabilities():
    assert torch.equal(*both(Net(), images(), PROBABILITIES, L2(0.5), images()))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16], ids=dtype_name)
@recent
def test_it_agrees_under_autocast_and_in_inference_mode(precision):
    x, net = images(dtype=torch.float32), Net(dtype=torch.float32)
    with torch.autocast("cpu", dtype=precision):
        assert torch.equal(*both(net, x, classes_of(), Linf(0.1), x))
    with torch.inference_mode():
        assert torch.equal(*both(net, x.clone(), classes_of(), Linf(0.1), x))


def test_a_confident_sample_keeps_its_gradient_in_float16():
    x = images(dtype=torch.float16)
    net = Net(dtype=torch.float16)
    with torch.no_grad():
        net.last.weight.mul_(100.0)
    pure, expected = both(net, x, classes_of(), Linf(0.1), x)
    assert torch.equal(pure, expected)
    assert bool((pure != x).flatten(1).any(dim=1).all())


def test_where_the_gradient_is_undefined_nothing_moves():
    def f(x):  # the root of 0 has none
        return torch.stack([(0 * x).sum(dim=1).sqrt(), x.sum(dim=1)], dim=1)

    x = uniform(0, 3, 4)
    for threat in (Linf(0.1), L2(0.5)):
        assert torch.equal(pure_pgd(f, x, torch.tensor([0, 1, 0]), threat, x), x)


# One graph --------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Linf", "Linf of each", "L2", "L1", "of the user's own"])
def test_all_steps_are_one_graph(name, compiler):
    x, labels, threat = images(dtype=torch.float32), classes_of(), THREATS[name]
    start = threat.random_start(x, generator=generator(0))
    with frozen(Net(dtype=torch.float32)) as f:
        attack = functools.partial(pure_pgd, f, x, labels, threat, steps=2)
        compiled = torch.compile(attack, fullgraph=True, backend=compiler)
        assert_close(compiled(start), attack(start), rtol=0, atol=1e-6)
    assert compiler.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("ball", [Linf, L2], ids=["Linf", "L2"])
def test_other_budgets_and_batches_are_the_same_graph(ball, compiler):
    x, labels = images(dtype=torch.float32), classes_of()
    graphs = []
    with frozen(Net(dtype=torch.float32)) as f:

        def attack(x, labels, threat, step_size):
            return pure_pgd(f, x, labels, threat, x, steps=1, step_size=step_size)

        compiled = torch.compile(attack, fullgraph=True, backend=compiler)
        for batch, eps in ((6, 0.1), (6, 0.05), (6, 0.03), (6, 8 / 255), (5, 0.1), (4, 0.1), (3, 0.02)):
            given = x[:batch], labels[:batch], ball(eps), eps
            found = compiled(*given)
            graphs.append(compiler.frame_count)
            assert_close(found, attack(*given), rtol=0, atol=1e-6)
            assert bool((ball(eps).norm(found - x[:batch]) <= eps).all())
    assert graphs == [1, 2, 2, 2, 3, 3, 3]  # one more where a number first changes


@pytest.mark.slow
@recent
def test_new_weights_are_the_same_graph(compiler):
    x, labels, model = images(), classes_of(), Net().train()

    def attack(f, x):
        return pure_pgd(f, x, labels, Linf(0.1), x, steps=1)

    compiled = torch.compile(attack, fullgraph=True, backend=compiler)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1.1)
        with frozen(model) as f:
            assert_close(compiled(f, x), attack(f, x), rtol=0, atol=1e-12)
    assert compiler.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("lane", [Lane(), Lane(dtype=torch.bfloat16)], ids=str)
def test_it_runs_and_compiles_in_a_lane(lane, compiler):
    model, views, labels, _ = problem()
    x, model = views[0].float(), model.float()
    with frozen(model, lane=lane) as f:
        f(x)
        attack = functools.partial(pure_pgd, f, x, labels, Linf(0.1), steps=2)
        pure = attack(x)
        compiled = torch.compile(attack, fullgraph=True, backend=compiler)(x)
    assert torch.equal(pure, pgd(model, x, labels, Linf(0.1), steps=2, start=x, lane=lane))
    assert pure.stride() == compiled.stride() == x.stride()
    assert (compiled.sign() != pure.sign()).float().mean() < 0.01
    assert compiler.frame_count == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
@recent
def test_inductor_agrees_up_to_rounding():
    torch._dynamo.reset()
    x, labels, threat = images(dtype=torch.float32), classes_of(), Linf(0.1)
    start = threat.random_start(x, generator=generator(0))
    with frozen(Net(dtype=torch.float32)) as f:
        attack = functools.partial(pure_pgd, f, x, labels, threat, steps=2)
        compiled, eager = torch.compile(attack, fullgraph=True)(start), attack(start)
    signs = [(x_adv - x).sign() for x_adv in (compiled, eager)]
    assert (signs[0] != signs[1]).float().mean() <= 0.02


@pytest.mark.filterwarnings("ignore")  # torch's, about its own way of loading forward mode
@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5)], ids=repr)
def test_no_mode_of_differentiation_follows_the_attack(threat):
    x, labels, weight = normal(0, 3, 4).sigmoid(), integers(1, 3, below=2), normal(2, 2, 4)

    def total(weight):
        x_adv = pure_pgd(lambda x: x @ weight.T, x, labels, threat, x, steps=2)
        return cross_entropy(x_adv.square() @ weight.T, labels).sum()

    forward_over_reverse, reverse = torch.func.hessian(total), torch.func.jacrev(torch.func.jacrev(total))
    assert_close(forward_over_reverse(weight), reverse(weight), rtol=1e-12, atol=1e-14)


# Many starts ------------------------------------------------------------------------------------------------------


@every_threat
def test_vmap_over_starts_equals_the_loop(threat):
    x, labels = images(), classes_of()
    starts = starts_of(threat, x)
    for model in (Net(), Pointwise()):
        with frozen(model) as f:
            attack = functools.partial(pure_pgd, f, x, labels, threat, steps=3)
            together, each = torch.vmap(attack)(starts), torch.stack([attack(start) for start in starts])
        assert_close(together, each, rtol=0, atol=1e-12)


@every_threat
def test_the_best_of_many_starts_is_that_of_pgd_with_restarts(threat):
    x, labels, model = images(), classes_of(), Pointwise()
    source = generator(0)
    starts = torch.stack([threat.random_start(x, generator=source) for _ in range(3)])
    with torch.no_grad(), frozen(model) as f:
        found = torch.vmap(lambda start: pure_pgd(f, x, labels, threat, start, steps=3))(starts)
        losses = torch.vmap(lambda x_adv: cross_entropy(f(x_adv), labels))(found)
    best = found[losses.argmax(dim=0), torch.arange(len(x))]
    expected = pgd(model, x, labels, threat, steps=3, restarts=3, generator=generator(0))
    assert_close(best, expected, rtol=0, atol=1e-12)


@pytest.mark.slow
@recent
def test_a_mapped_attack_is_one_graph_too(compiler):
    x, labels, threat = images(), classes_of(), L2(0.5)
    starts = starts_of(threat, x)
    with frozen(Pointwise()) as f:
        mapped = torch.vmap(functools.partial(pure_pgd, f, x, labels, threat, steps=2))
        compiled = torch.compile(mapped, fullgraph=True, backend=compiler)
        assert_close(compiled(starts), mapped(starts), rtol=0, atol=1e-12)
    assert compiler.frame_count == 1


@pytest.mark.slow
@recent
def test_batch_norm_folded_by_a_lane_maps_as_one_graph(compiler):
    model, views, labels, _ = problem()
    x, threat, lane = views[0], Linf(0.1), Lane(channels_last=False)
    starts = starts_of(threat, x)
    with frozen(model, lane=lane) as f:
        f(x)
        mapped = torch.vmap(functools.partial(pure_pgd, f, x, labels, threat, steps=1))
        compiled = torch.compile(mapped, fullgraph=True, backend=compiler)
        assert_close(compiled(starts), mapped(starts), rtol=0, atol=1e-12)
    assert compiler.frame_count == 1


# Pure -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5), L1(2.0)], ids=repr)
def test_it_needs_its_steps_and_nothing_else(threat):
    model, views, labels, _ = problem()
    model.eval()  # its parameters still want gradients
    x = views[0].clone().requires_grad_()
    found = []
    spent = cost(lambda: found.append(pure_pgd(model, x, labels, threat, x)), batch=BATCH)
    assert spent == Cost(10, 10, 0, 0)
    assert not found[0].requires_grad
    assert x.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())


# Refusals ---------------------------------------------------------------------------------------------------------


X, LABELS = images(), classes_of()
NET = Net().eval()
WRONG = {
    "a word for a start": ({"start": "random"}, TypeError, "`start` must be a torch.Tensor"),
    "a start of another shape": ({"start": X[:5]}, ValueError, "`start` has shape"),
    "no threat": ({"threat": 0.1}, TypeError, "`threat` must be a threat model"),
    "no function": ({"f": "net"}, TypeError, "must be callable"),
    "no steps": ({"steps": 0}, ValueError, "`steps` must be at least 1"),
    "a step backwards": ({"step_size": -0.1}, ValueError, "`step_size` must lie in"),
    "a tensor backwards": ({"step_size": torch.tensor(-0.1)}, ValueError, "`step_size` must lie in"),
    "steps for others": ({"step_size": torch.ones(3)}, ValueError, r"`step_size` must be .* of shape \(6,\)"),
    "a step in 255ths": ({"step_size": 3.0}, ValueError, "did you mean 3 / 255"),
    "no loss": ({"loss": None}, TypeError, "`loss` must be a function"),
    "a loss between classes": ({"loss": targeted_dlr}, ValueError, "`loss`=targeted_dlr .* needs `targets`"),
    "float labels": ({"labels": LABELS.double()}, TypeError, "integer class indices"),
    "logits in a tuple": ({"f": lambda x: (NET(x),)}, TypeError, "must return a tensor of logits, got tuple"),
    "logits of no class": ({"f": lambda x: NET(x)[:, 0]}, ValueError, r"logits of shape \(6, K\)"),
    "logits without history": ({"f": lambda x: NET(x).detach()}, ValueError, "do(es)? not depend on its input"),
    "constant logits": ({"f": lambda x: torch.zeros(6, 5)}, ValueError, "do(es)? not depend on its input"),
    "a reduced loss": ({"loss": functional.cross_entropy}, ValueError, "one value per sample"),
    "a module in train mode": ({"f": Net().train()}, ValueError, "`f` must be in eval mode, but the Net is in train"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_meant_is_refused(name):
    changed, error, words = WRONG[name]
    call = {"f": NET, "x": X, "labels": LABELS, "threat": Linf(0.1), "start": X, **changed}
    with pytest.raises(error, match=f"^pure_pgd: .*{words}"):
        pure_pgd(call.pop("f"), call.pop("x"), call.pop("labels"), call.pop("threat"), call.pop("start"), **call)


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize("f", [
    lambda x: NET(Rounded.apply(x)),
    lambda x: checkpoint(NET, x, use_reentrant=False),
    lambda x: checkpoint(NET, x, use_reentrant=True),
], ids=["an older Function", "checkpoint", "reentrant checkpoint"])  # fmt: skip
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_what_torch_func_cannot_go_through_is_said(f):
    with pytest.raises(ValueError, match=r"^pure_pgd: `f` (holds|uses) .* Take `pgd`"):
        pure_pgd(f, X, LABELS, Linf(0.1), X)


def test_a_frozen_lstm_says_how_torch_func_can_go_through_it():
    lstm = nn.LSTM(4, 3, batch_first=True).eval().requires_grad_(False)
    attack = functools.partial(pure_pgd, lambda x: lstm(x)[0][:, -1], steps=1)
    x = uniform(0, 2, 5, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^pure_pgd: `f` has a recurrent layer .*mkldnn.flags"):
        attack(x=x, labels=torch.tensor([0, 1]), threat=Linf(0.1), start=x)


def test_batch_norm_in_train_mode_is_refused_by_name_and_left_alone():
    net = Net().eval()
    net.norm.train()
    with pytest.raises(ValueError, match=r"its part 'norm' is in train mode; .* `with frozen\(model\) as f`"):
        pure_pgd(net, X, LABELS, Linf(0.1), X)
    assert net.norm.num_batches_tracked == 0


@recent
def test_logits_that_do_not_depend_on_the_input_are_refused_in_a_graph_too(compiler):
    attack = functools.partial(pure_pgd, lambda x: NET(x).detach(), X, LABELS, Linf(0.1))
    with pytest.raises(Exception, match=r"do(es)? not depend on its input"):
        torch.compile(attack, fullgraph=True, backend=compiler)(X)
