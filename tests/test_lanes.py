"""Lanes: the same logits, gradients and verdicts as the model itself, from a copy that costs less."""

import functools
import gc
import inspect
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.testing import assert_close

from perceptual_at import (
    L1,
    L2,
    Lane,
    Linf,
    apgd,
    auto_attack,
    cw,
    evaluate,
    fab,
    fgsm,
    frozen,
    models,
    objectives,
    pgd,
    snapshot,
    square,
)
from perceptual_at.victims import rewriting, twins
from tests.needs import ONE_VIEW, OWN_TESTS, needs
from tests.strategies import generator, uniform, words

FP32, BF16 = Lane(), Lane(dtype=torch.bfloat16)
THREAT = Linf(8 / 255)


class Branching(nn.Module):
    """Decides by the values of its input, so that it cannot be traced."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))

    def forward(self, x):
        return self.layers(x) if x.sum() > 0 else -self.layers(x)


class Tangled(nn.Module):
    """What must not be folded: a layer used twice, an output that others read too; a mean kept as a plain tensor."""

    def __init__(self):
        super().__init__()
        self.mean = torch.tensor([0.5, 0.25, 0.75]).reshape(3, 1, 1)
        self.first, self.again, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.other, self.last = nn.BatchNorm2d(4, affine=False), nn.Linear(4, 3)

    def forward(self, x):
        out = self.first(x - self.mean)
        out = out + torch.relu(self.norm(self.again(out)))
        out = self.other(self.again(out)) + torch.ones(4, 1, 1)
        return self.last(out.mean(dim=(2, 3)).view(x.size(0), -1))


def upsampling():
    return nn.Sequential(
        nn.ConvTranspose2d(3, 4, 2, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5, affine=False), nn.Dropout(), nn.Linear(5, 3),
    )  # fmt: skip


def voluminous():
    """Its weights have five dimensions, for which there is no format of four."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.AdaptiveAvgPool3d(1),
        nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def sensitive():
    """Small perturbations decide what it says."""
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    nn.init.normal_(layers[4].weight, std=0.5)
    return layers


MODELS = {
    "resnet18": (functools.partial(models.resnet18, width=4), 20),
    "preact_resnet18": (functools.partial(models.preact_resnet18, width=4), 8),
    "normalised wide resnet": (
        lambda: models.normalized(models.WideResNet(depth=10, widen_factor=1), (0.5, 0.4, 0.3), (0.2, 0.1, 0.2)), 3
    ),
    "transposed and linear": (upsampling, 2),
    "three-dimensional": (voluminous, 1),
    "tangled": (Tangled, 0),
}  # fmt: skip
every_model = pytest.mark.parametrize("name", MODELS)


def prepared(make, seed=0):
    """A model whose batch norms have seen data, and whose affine weights are not those of the start."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        for part in model.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.affine:
                nn.init.uniform_(part.weight, 0.5, 2.0)
                nn.init.normal_(part.bias, 0.0, 0.5)
        for _ in range(3):
            model(images(16, seed=seed))
    return model


def images(count=6, size=8, seed=0):
    return uniform(seed, count, 3, size, size, dtype=torch.float32)


def labels_of(model, x):
    with torch.no_grad(), frozen(model) as f:
        return f(x).argmax(dim=1)


def input_gradient(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x).float().logsumexp(dim=1).sum(), x)[0]


@every_model
def test_logits_and_gradients_are_those_of_the_model(name):
    make, folds = MODELS[name]
    model, x = prepared(make), images()
    with frozen(model, lane=FP32) as f:
        assert_close(f(x), f.exact(x), rtol=1e-4, atol=1e-5)
        assert_close(input_gradient(f, x), input_gradient(f.exact, x), rtol=1e-3, atol=1e-5)
        assert len(f._twin.folds) == folds
        assert [note.partition(":")[0] for note in f.notes] == ([] if folds else ["nothing is folded"])


@every_model
def test_bfloat16_is_close_and_weights_of_the_model_stay_as_they_are(name):
    make, _ = MODELS[name]
    model, x = prepared(make), images()
    before = snapshot(model)
    with frozen(model, lane=BF16) as f:
        fast, exact = f(x), f.exact(x)
        kept = [part.running_var for part in f._twin.module.modules() if isinstance(part, nn.BatchNorm2d)]
    assert all(variance.dtype == torch.float32 for variance in kept)
    assert bool(kept) == (name not in ("resnet18", "transposed and linear", "three-dimensional"))
    assert fast.dtype == torch.bfloat16
    assert exact.dtype == torch.float32
    assert (fast - exact).abs().max() < 0.1 * exact.abs().max()
    assert all(torch.equal(value, before[key]) for key, value in snapshot(model).items())


def test_images_are_cast_after_their_normalisation():
    # 3/4 + 2^-10 and 3/4 are the same number in bfloat16, but not once the mean is subtracted.
    layer = nn.Conv2d(1, 2, 1, bias=False)
    nn.init.ones_(layer.weight)
    model = models.normalized(nn.Sequential(layer, nn.Flatten()), (0.75,), (0.5,))
    x = torch.full((1, 1, 1, 1), 0.75 + 2**-10)
    with frozen(model, lane=BF16) as f:
        assert_close(f(x).float(), torch.full((1, 2), 2**-9))


@pytest.mark.slow
@pytest.mark.parametrize("threat", [Linf(8 / 255), L2(0.5), L1(4.0)], ids=lambda threat: type(threat).__name__)
def test_the_fp32_lane_takes_the_plain_attacks_steps(threat):
    model, x = prepared(MODELS["resnet18"][0]), images(16)
    labels = labels_of(model, x)
    attack = functools.partial(pgd, model, x, labels, threat, steps=5, start="clean")
    plain, fast = attack(), attack(lane=FP32)
    assert not torch.equal(plain, x)
    # Only entries whose gradient is zero up to rounding may take another sign.
    assert ((plain - fast).abs() > 1e-5).double().mean() < 1e-3


@pytest.mark.parametrize("lane", [FP32, BF16], ids=["fp32", "bf16"])
def test_results_lie_in_memory_as_the_inputs_do(lane):
    model, x = prepared(MODELS["resnet18"][0]), images()
    labels = labels_of(model, x)
    for laid in (x, x.contiguous(memory_format=torch.channels_last)):
        x_adv = pgd(model, laid, labels, THREAT, steps=2, lane=lane, generator=generator(0))
        assert x_adv.stride() == laid.stride()
        assert x_adv.dtype == torch.float32
        assert (THREAT.norm(x_adv.double() - laid) <= 8 / 255).all()


def test_weights_are_renewed_when_an_attack_begins():
    model, x = prepared(MODELS["resnet18"][0]), images()
    with frozen(model, lane=FP32) as f:
        before = f(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()(x).square().mean().backward()
    optimizer.step()
    with frozen(model, lane=FP32) as f:
        assert not torch.allclose(f(x), before, rtol=1e-2)
        assert_close(f(x), f.exact(x), rtol=1e-4, atol=1e-5)
    model.linear.weight.data = -model.linear.weight.data  # no version counter notices
    model.bn1.running_var *= 4
    with frozen(model, lane=FP32) as f:
        assert_close(f(x), f.exact(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_one_twin_serves_every_attack_and_goes_with_its_model():
    model, x = prepared(MODELS["resnet18"][0]), images()
    made = []
    for _ in range(2):
        with frozen(model, lane=FP32) as f:
            f(x)
            made.append(weakref.ref(f._twin))
    assert made[0]() is made[1]()
    assert len(twins._TWINS[model]) == 1
    del model, f
    gc.collect()
    assert made[0]() is None


@pytest.mark.parametrize("change", ["layer", "setting", "dtype"])
def test_a_model_that_was_changed_gets_another_twin(change):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.scale = upsampling(), 1.0

        def forward(self, x):
            return self.scale * self.layers(x)

    model, x = prepared(Scaled), images()
    with frozen(model, lane=FP32) as f:
        f(x)
    if change == "layer":
        model.layers[2] = nn.Sigmoid()
    elif change == "setting":
        model.scale = 3.0
    else:
        model, x = model.double(), x.double()
    with frozen(model, lane=FP32) as f:
        assert_close(f(x), f.exact(x), rtol=1e-4, atol=1e-5)


def test_a_model_that_cannot_be_traced_runs_as_it_is_and_says_why():
    model, x = prepared(Branching), images()
    with frozen(model, lane=BF16) as f:
        with pytest.warns(UserWarning, match="batch norm is not folded, because the model cannot be traced: TraceErr"):
            f(x)
        assert "TraceError" in f.notes[0]
        assert_close(f(x).float(), f.exact(x), rtol=0.0, atol=0.05)
        assert_close(f(-x).float(), f.exact(-x), rtol=0.0, atol=0.05)


def test_layers_with_hooks_are_left_alone():
    model, x = prepared(upsampling), images()
    model[0].register_forward_hook(lambda layer, args, output: output + 1)
    with frozen(model, lane=FP32) as f, pytest.warns(UserWarning, match="'0' has forward hooks"):
        assert_close(f(x), f.exact(x))


def test_a_graph_that_computes_something_else_is_not_used():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = upsampling()

        def forward(self, x):
            return self.layers(x) * float(torch.rand(()))  # a graph would hold one number for ever

    model, x = prepared(Noisy), images()
    with frozen(model, lane=FP32) as f:
        torch.manual_seed(0)
        with pytest.warns(UserWarning, match="its graph gives other logits"):
            fast = f(x)
        torch.manual_seed(0)
        assert_close(fast, f.exact(x))  # making the twin drew nothing


def test_a_model_that_cannot_be_copied_is_refused():
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.lock = threading.Lock()  # which Python refuses to copy

        def forward(self, x):
            return self.layer(x)

    with frozen(Held(), lane=FP32) as f, pytest.raises(ValueError, match="frozen: `lane` needs a copy of the model"):
        f(torch.rand(1, 2))
    with pytest.raises(ValueError, match=r"^pgd: `lane` needs a copy of the model"):
        pgd(Held(), torch.rand(1, 2), torch.tensor([0]), THREAT, lane=FP32)


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("kind", ["complex weights", "no kernel"])
@pytest.mark.parametrize("attack", [pgd, auto_attack])
def test_a_model_that_cannot_run_in_the_dtype_of_a_lane_is_refused(kind, attack):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3, dtype=torch.cfloat if kind == "complex weights" else None)
            if kind == "no kernel":
                nn.utils.parametrizations.orthogonal(self.layer)

        def forward(self, x):
            x = x.flatten(1)
            return self.layer(x.to(torch.cfloat) if kind == "complex weights" else x).abs()

    net, x = Net(), torch.rand(2, 1, 2, 2)
    with pytest.raises(
        ValueError, match=rf"^{attack.__name__}: the model cannot run in Lane\(.*Take a lane without `dt"
    ):
        attack(net, x, net(x).argmax(dim=1), THREAT, lane=Lane(dtype=torch.bfloat16))
    attack(net, x, 1 - net(x).argmax(dim=1).clamp_max(1), THREAT, lane=FP32)


@pytest.mark.filterwarnings("ignore:Lane. batch norm is not folded")
@pytest.mark.parametrize("way", ["kept", "pruned", "cached"])
def test_what_passes_leave_in_attributes_is_no_hindrance(way):
    class Keeps(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net, self.cached = net, way == "cached"

        def train(self, mode=True):
            if self.cached and not mode:  # as equivariant layers keep the filters that they are expanded to
                self.register_buffer("filter", 2 * self.net[-1].weight)
            return super().train(mode)

        def forward(self, x):
            self.seen = None if self.cached else self.net[:2](x)
            return self.net(x) + (self.filter.mean() if self.cached else 0)

    model, x = Keeps(prepared(upsampling)), images()
    if way == "pruned":
        prune.random_unstructured(model.net[-1], "weight", amount=0.3)
    model.eval()
    for _ in range(2):
        if way != "cached":
            model(x).sum().backward()  # after which an attribute has a history
        with frozen(model, lane=FP32) as f:
            assert_close(f(x), f.exact(x))


def test_nothing_of_the_model_or_the_random_state_moves():
    model, x = prepared(upsampling).train(), images()
    model[1].eval()
    model[5].weight.requires_grad_(False)
    modes, before, state = [part.training for part in model.modules()], snapshot(model), torch.get_rng_state()
    with frozen(model, lane=FP32) as f, pytest.raises(RuntimeError, match="channels"):
        f(x[:, :2])
    assert [part.training for part in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert all(torch.equal(value, before[key]) for key, value in snapshot(model).items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_lanes_work_in_every_mode_of_autograd_and_under_autocast():
    model, x = prepared(upsampling), images()
    labels = labels_of(model, x)
    attack = functools.partial(pgd, model, x, labels, THREAT, steps=2, start="clean")
    expected = attack()
    with torch.inference_mode():
        with frozen(model, lane=FP32) as f:
            assert_close(f(x), f.exact(x), rtol=1e-4, atol=1e-5)
        first = attack(lane=FP32)
    with torch.no_grad():
        assert_close(attack(lane=FP32), first)
    assert_close(first, expected, atol=1e-6, rtol=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16), frozen(model, lane=Lane(dtype=torch.float32)) as f:
        assert f(x).dtype == torch.float32


def test_compiled_and_wrapped_models_have_twins_of_what_is_inside():
    model, x = prepared(upsampling), images()
    labels = labels_of(model, x)
    compiled = torch.compile(model, backend="eager")
    attack = functools.partial(pgd, x=x, labels=labels, threat=THREAT, steps=2, start="clean", lane=FP32)
    assert_close(attack(compiled), attack(model))
    assert model in twins._TWINS
    assert compiled not in twins._TWINS


def test_a_lane_can_be_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model, x = prepared(upsampling), images()
    with frozen(model, lane=Lane(compile=True)) as f:
        assert_close(f(x), f.exact(x), rtol=1e-4, atol=1e-5)
        assert hasattr(f._twin.call, "_orig_mod")


def test_cuda_graphs_need_a_cuda_device():
    model, x = prepared(upsampling), images()
    lane = Lane(cuda_graphs=True)
    with frozen(model, lane=lane) as f, pytest.warns(UserWarning, match="no CUDA graphs, because the inputs are on 'c"):
        assert_close(f(x), f.exact(x), rtol=1e-4, atol=1e-5)


def test_float16_keeps_the_gradient_of_confident_samples():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
        model[1].bias[0] = 14
    x, labels = images(), torch.zeros(6, dtype=torch.long)
    x_adv = pgd(model, x, labels, THREAT, start="clean", lane=Lane(dtype=torch.float16))
    assert (THREAT.norm(x_adv - x) > 0.9 * THREAT.eps).all()


SEARCHES = {
    "pgd": functools.partial(pgd, steps=4, keep="best", verdict=True),
    "fgsm": functools.partial(fgsm, verdict=True),
    "cw": functools.partial(cw, steps=4, verdict=True),
    "apgd": functools.partial(apgd, steps=8, verdict=True),
    "fab": functools.partial(fab, steps=4, verdict=True),
    "square": functools.partial(square, queries=8, verdict=True),
    "auto_attack": functools.partial(auto_attack, version=[("apgd-ce", {"steps": 8})], verdict=True),
}
every_search = pytest.mark.parametrize("search", SEARCHES)


@every_search
def test_a_success_is_one_of_the_model_itself(search, monkeypatch):
    model, x = prepared(sensitive), images(8)
    labels = labels_of(model, x)
    run = functools.partial(SEARCHES[search], model, x, labels, Linf(1 / 255), generator=generator(0))
    honest = run(lane=BF16)
    call = twins._Twin.__call__

    def lying(twin, x):  # samples are taken for other classes too easily
        logits = call(twin, x)
        return logits - 3.0 * nn.functional.one_hot(labels[: len(x)], 10).to(logits)

    monkeypatch.setattr(twins._Twin, "__call__", lying)
    for found in (honest, run(lane=BF16)):
        with torch.no_grad(), frozen(model) as f:
            assert torch.equal(found.success, f(found.x_adv).argmax(dim=1) != labels)


@every_search
def test_the_fp32_lane_finds_what_the_plain_attack_finds(search):
    model, x = prepared(sensitive), images(8)
    labels = labels_of(model, x)
    run = functools.partial(SEARCHES[search], model, x, labels, Linf(4 / 255))
    plain, fast = run(generator=generator(0)), run(generator=generator(0), lane=FP32)
    assert plain.success.any()
    assert torch.equal(plain.success, fast.success)
    assert torch.equal(plain.gradients, fast.gradients)


def test_auto_attack_says_what_it_searched_in():
    model, x = prepared(sensitive), images(4)
    found = auto_attack(model, x, labels_of(model, x), THREAT, version=["apgd-ce"], lane=BF16, verdict=True)
    assert f"searched in {BF16}, every success confirmed by the model itself" in found.protocol.notes


def test_evaluate_attacks_in_the_lane_and_judges_by_the_model(monkeypatch):
    model, x = prepared(sensitive), images(12)
    labels = labels_of(model, x)
    attacks = {"pgd": functools.partial(pgd, threat=Linf(4 / 255), steps=4)}
    run = functools.partial(evaluate, model, [(x, labels)], attacks, progress=False)
    plain, fast = run(), run(lane=FP32)
    assert torch.equal(plain.robust["pgd"], fast.robust["pgd"])
    assert fast.provenance["lane"] == str(FP32)
    assert "lane" not in plain.provenance
    monkeypatch.setattr(twins._Twin, "__call__", lambda twin, x: torch.zeros(len(x), 10) * x.sum())
    wrong = run(lane=FP32)  # gradients of a lane that knows nothing; verdicts of the model
    assert wrong.clean_accuracy == 1.0
    assert wrong.robust_accuracy["pgd"] > plain.robust_accuracy["pgd"]


OBJECTIVES = [name for name in objectives.__all__ if name not in OWN_TESTS]


# IKL's attack begins where its loss is nearly flat: rounding decides 6 % of the entries here.
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "ikl"])
def test_objectives_attack_in_the_lane_and_learn_on_the_model(name):
    model, x = prepared(MODELS["transposed and linear"][0]), images(6)
    labels = torch.arange(6) % 3
    attack = functools.partial(pgd, threat=THREAT, steps=2)

    options = {"average": snapshot(model)} if name in ("rebat", "rpat_plus_plus", "raat_sharp") else {}
    options |= {"mix": 0.75} if name in ("raat", "raat_plus_plus", "raat_sharp", "dicar", "rpat_raat") else {}
    options |= {"threat": THREAT} if name in ("grad_align", "random_noise") else {}
    options |= needs(name, model, x, 3, steps=2)
    views = (x,) if name in ONE_VIEW else (x, x.flip(3))
    drawn = "generator" in inspect.signature(getattr(objectives, name)).parameters
    results, before = [], snapshot(model)
    for lane in (None, FP32):
        model.load_state_dict(before)
        torch.manual_seed(0)  # of the dropout
        noise = {"generator": generator(0)} if drawn else {}
        loss, _ = getattr(objectives, name)(
            model, views, labels, functools.partial(attack, lane=lane, generator=generator(1)), **options, **noise
        )
        model.zero_grad()
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()]))
    assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)


REFUSED = [
    ("no lane", {"lane": "bf16"}, TypeError, r"pgd: `lane` must be a Lane or None, got 'bf16'\. .* Lane\(dtype="),
    ("train mode", {"lane": FP32, "model_mode": "as_is"}, ValueError, "pgd: a `lane` is always in eval mode"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "options", "error", "message"), REFUSED, ids=words)
def test_what_cannot_be_had_is_refused(case, options, error, message):
    x = torch.rand(2, 3)
    with pytest.raises(error, match=message):
        pgd(nn.Linear(3, 2), x, torch.zeros(2, dtype=torch.long), THREAT, **options)


def test_a_callable_has_no_twin():
    x, labels = torch.rand(2, 3), torch.zeros(2, dtype=torch.long)
    for function in (pgd, fgsm, cw, apgd, fab, auto_attack):
        with pytest.raises(TypeError, match=f"{function.__name__}: `lane` needs a torch.nn.Module to copy, got functi"):
            function(
                lambda x: x, x, labels, THREAT, lane=FP32, **({"version": ["fab"]} if function is auto_attack else {})
            )
    with pytest.raises(TypeError, match="evaluate: `lane` needs a torch"):
        evaluate(lambda x: x, [(x, labels)], {}, lane=FP32, progress=False)


def test_a_lane_is_not_run_in_a_lane_or_in_train_mode():
    model, x = nn.Linear(3, 2), torch.rand(2, 3)
    with frozen(model, lane=FP32) as f:
        with frozen(f) as same:
            assert same is f
        with pytest.raises(ValueError, match="pgd: `model` runs in Lane"):
            pgd(f, x, torch.zeros(2, dtype=torch.long), THREAT, lane=BF16)
        with pytest.raises(ValueError, match="frozen: `model` runs in a lane, which is always in eval mode"):
            frozen(f, model_mode="as_is").__enter__()


def test_the_official_code_takes_no_lane():
    x = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match="auto_attack: `lane` has no effect with backend='pyautoattack'"):
        auto_attack(upsampling(), x, torch.zeros(2, dtype=torch.long), THREAT, backend="pyautoattack", lane=FP32)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fold": 1}, TypeError, "Lane: `fold` must be True or False, got 1"),
        ({"dtype": "bf16"}, TypeError, "Lane: `dtype` must be a torch.dtype"),
        ({"dtype": torch.int8}, ValueError, "Lane: `dtype` must be a floating dtype, got torch.int8"),
    ],
    ids=["fold", "word", "integer"],
)
def test_options_of_a_lane_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        Lane(**options)


def test_random_numbers_are_those_of_the_plain_attack():
    model, x = prepared(upsampling), images()
    labels = labels_of(model, x)
    starts = [pgd(model, x, labels, THREAT, steps=1, step_size=1e-9, lane=lane, generator=generator(3))
              for lane in (None, FP32)]  # fmt: skip
    assert_close(starts[0], starts[1], atol=1e-6, rtol=0.0)


# Rewriting ----------------------------------------------------------------------------------------------------------


class Reused(nn.Module):
    """Values that must not be written over: the input, what two read, what a backward pass needs, views."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.offset = nn.Parameter(torch.randn(1, 4, 1, 1))

    def forward(self, x):
        shifted = torch.relu(x) + x  # the input is the caller's
        out = self.norm(self.conv(shifted))
        kept = out.relu() + out  # two read `out`
        wide = self.offset + kept  # one side is larger than the other
        squared = wide * wide
        total = squared.exp().clamp(max=3.0) + torch.relu(squared)  # products and exponentials keep their results
        seen = total.view_as(total) + self.offset
        return self.last((seen + seen).mean(dim=(2, 3)) + total.flatten(2).sum(dim=2))


@pytest.mark.parametrize("make", [Reused, *(make for make, _ in MODELS.values())], ids=["reused", *MODELS])
def test_values_are_written_over_only_where_nobody_else_reads_them(make):
    model, x = prepared(make).double().eval(), images().double()
    before = x.clone()
    with frozen(model, lane=Lane()) as f:
        for _ in range(2):
            assert_close(f(x), f.exact(x), rtol=1e-9, atol=1e-9)
            assert_close(input_gradient(f, x), input_gradient(f.exact, x), rtol=1e-9, atol=1e-9)
        alone = f(x[:1])
    assert torch.equal(x, before)
    with frozen(prepared(make).double().eval(), lane=Lane()) as f:
        assert_close(f(x[:1]), alone, rtol=1e-9, atol=1e-9)  # made for one sample, used for several
        assert_close(f(x)[:1], alone, rtol=1e-9, atol=1e-9)


def test_a_residual_network_writes_its_relus_and_sums_in_place():
    model, x = prepared(functools.partial(models.resnet18, width=4)), images()
    with frozen(model, lane=Lane()) as f:
        f(x)
        targets = [node.target for node in f._twin.module.graph.nodes]
    assert targets.count(torch.relu_) == 17
    assert targets.count("add_") == 8


def test_layers_of_many_weights_and_few_places_run_contiguous(monkeypatch):
    monkeypatch.setattr(rewriting, "_MANY_WEIGHTS", 16 * 16 * 9)
    model, x = prepared(functools.partial(models.resnet18, width=4)), images(size=32)
    for lane, late in ((FP32, 9), (BF16, 0), (Lane(channels_last=False), 0)):
        with frozen(model, lane=lane) as f:
            f(x)
            assert len(f._twin.late) == late
    with frozen(model, lane=FP32) as f:
        assert_close(f(x), f.exact(x), rtol=1e-4, atol=1e-4)
        assert_close(input_gradient(f, x), input_gradient(f.exact, x), rtol=1e-3, atol=1e-4)
        assert f._twin.module.get_submodule("layer4.0.conv1").weight.is_contiguous()
