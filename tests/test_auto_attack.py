"""AutoAttack: the composition that was published, the verdicts of the official code, a stamp that cannot be forged."""

import dataclasses
import json
import logging
import sys
import types

import pytest
import torch
from torch import nn

from perceptual_at import L1, L2, Linf, Protocol, SampleGenerator, apgd, auto_attack, dlr, kl_to, margin
from perceptual_at.attacks import official
from perceptual_at.attacks.protocol import composition_of
from tests.robust_model import robust_digits
from tests.strategies import generator, uniform, words
from tests.test_attack_contract import Net, Picture, Pointwise, assert_allowed, classes_of, images, random_states

QUICK = [
    ("apgd-ce", {"steps": 20}),
    ("apgd-t", {"steps": 20, "target_classes": 3}),
    ("fab-t", {"steps": 20, "target_classes": 3}),
    ("square", {"queries": 60}),
]


def numbers(x, seed=0):
    return SampleGenerator(seed, torch.arange(len(x)))


# Beside the official code -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("threat", [Linf(0.15), L2(0.75), L1(1.5)], ids=repr)
def test_verdicts_are_those_of_the_official_code(threat):
    pytest.importorskip("pyautoattack", reason="compares with the official code")
    model, x, labels = robust_digits()
    ours = auto_attack(model, x, labels, threat, version=QUICK, verdict=True, generator=numbers(x))
    theirs = auto_attack(
        model, x, labels, threat, version=QUICK, backend="pyautoattack", verdict=True, generator=numbers(x)
    )
    assert 0.1 < theirs.robust.double().mean() < 0.9
    # With these short budgets; with the published ones see docs/results/autoattack.json.
    assert (ours.success == theirs.success).double().mean() >= 0.93
    assert abs(ours.robust.double().mean() - theirs.robust.double().mean()) <= 0.04
    assert list(ours.robust_after) == list(theirs.robust_after) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    for name in ("clean", "apgd-t", "fab-t", "square"):
        assert abs(ours.robust_after[name] - theirs.robust_after[name]) <= 0.04
    assert theirs.protocol.backend == "pyautoattack"
    assert official.NOTE in theirs.protocol.notes
    assert ours.protocol.attacks == theirs.protocol.attacks


def test_the_official_code_leaves_no_traces():
    pytest.importorskip("pyautoattack", reason="runs the official code")
    model, x = Net(dtype=torch.float32).train(), images(dtype=torch.float32)
    with torch.no_grad():
        labels = model.eval()(x).argmax(dim=1)
    model.train()
    before, states, outer = Picture(model), random_states(), sys.gettrace()
    handlers = list(logging.getLogger("auto-attack").handlers)
    version = [(name, {"steps": 3}) for name in ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t")]
    sys.settrace(nobody := lambda frame, event, argument: None)
    try:
        found = auto_attack(model, x, labels, Linf(0.02), version=version, backend="pyautoattack", verdict=True)
        tracing = sys.gettrace()
    finally:
        sys.settrace(outer)
    assert tracing is nobody
    before.assert_unchanged()
    assert random_states() == states
    assert logging.getLogger("auto-attack").handlers == handlers
    assert found.robust.any()
    assert_allowed(Linf(0.02), found.x_adv, x)
    assert torch.equal(found.success, model.eval()(found.x_adv).argmax(dim=1) != labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threat": Linf(0.1, bounds=(-1.0, 1.0))}, r"knows one eps and the box \[0, 1\] only"),
        ({"threat": Linf(torch.full((6,), 0.1))}, r"knows one eps and the box \[0, 1\] only"),
        ({"model": Net(classes=3, dtype=torch.float32), "version": ["apgd-t"]}, "apgd-t needs at least 4 classes"),
        ({"x": images()}, "computes in float32, got inputs of torch.float64"),
        ({"version": [("square", {"reach_edge": True})]}, "never touches the last row and column"),
        ({"version": [("fab-t", {"restarts": 2, "steps": 2})]}, "fab-t always runs once"),
        ({"version": [("apgd-ce", {"loss": margin})]}, "'apgd-ce' of the official code takes no `loss`"),
        ({"version": [("fab", {"overshoot": 1.2})]}, "'fab' of the official code takes no `overshoot`"),
        ({"version": ["square", ("apgd-t", {"early_stop": False})]}, "'apgd-t' .* takes no `early_stop`"),
    ],
)  # fmt: skip
def test_what_the_official_code_cannot_do_is_refused(options, message):
    pytest.importorskip("pyautoattack", reason="runs the official code")
    options = {"model": Net(dtype=torch.float32), "x": images(dtype=torch.float32), "threat": Linf(0.1), **options}
    model, x, threat = (options.pop(name) for name in ("model", "x", "threat"))
    labels = model.to(x.dtype).eval()(x).argmax(dim=1)
    with pytest.raises(ValueError, match=f"^auto_attack: .*{message}"):
        auto_attack(model, x, labels, threat, backend="pyautoattack", **options)


def test_no_samples_are_too_few_for_no_official_attack():
    pytest.importorskip("pyautoattack", reason="runs the official code")
    model, x, labels = Net(dtype=torch.float32), images(dtype=torch.float32), classes_of()
    assert auto_attack(model, x[:0], labels[:0], Linf(0.02), backend="pyautoattack").shape == (0, *x.shape[1:])


def test_the_official_code_takes_the_options_that_it_has():
    pytest.importorskip("pyautoattack", reason="runs the official code")
    from pyautoattack import autopgd_base
    from pyautoattack import square as official_square

    model, x = Net(dtype=torch.float32), images(dtype=torch.float32)
    runner, common = types.SimpleNamespace(), {"norm": "Linf", "eps": 0.1, "device": x.device, "seed": 0}
    official._set_up("pyautoattack", runner, model, "apgd-ce", {"steps": 3, "restarts": 1, "rho": 0.5}, common)
    official._set_up("pyautoattack", runner, model, "square", {"queries": 3, "restarts": 1, "p_init": 0.3}, common)
    assert isinstance(runner.apgd, autopgd_base.APGDAttack)
    assert isinstance(runner.square, official_square.SquareAttack)
    assert (runner.apgd.thr_decr, runner.square.p_init) == (0.5, 0.3)


def test_without_the_official_code_its_backend_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    monkeypatch.setitem(sys.modules, "autoattack", None)
    x = images(dtype=torch.float32)
    with pytest.raises(ImportError, match=r"auto_attack: pyautoattack is needed .*pip install pyautoattack"):
        auto_attack(Net(dtype=torch.float32), x, classes_of(), Linf(0.1), backend="pyautoattack")


def test_the_official_code_is_found_under_its_other_name_too(monkeypatch):
    pytest.importorskip("pyautoattack", reason="stands in for the package of the other name")
    import pyautoattack
    from pyautoattack import autopgd_base

    class Suite:  # the interface of the package that comes from the authors' repository
        def __init__(
            self, model, norm="Linf", eps=0.3, seed=None, attacks_to_run=(), version="standard", device="cuda"
        ):
            self.inner = pyautoattack.AutoAttack(
                model, norm=norm, eps=eps, seed=seed, attacks=attacks_to_run, version=version, device=device
            )

        def __setattr__(self, name, value):
            setattr(self if name == "inner" else self.inner, name, value) if name != "inner" else object.__setattr__(
                self, name, value
            )

        def run_standard_evaluation(self, x, y, bs=250):
            return self.inner.run_standard_evaluation(x, y, batch_size=bs)[0]

    other = types.ModuleType("autoattack")
    other.AutoAttack = Suite
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    monkeypatch.setitem(sys.modules, "autoattack", other)
    monkeypatch.setitem(sys.modules, "autoattack.autopgd_base", autopgd_base)
    model, x = Net(dtype=torch.float32).eval(), images(20, dtype=torch.float32)
    labels = model(x).argmax(dim=1)
    found = auto_attack(
        model, x, labels, Linf(0.3), version=[("apgd-ce", {"steps": 5})], backend="pyautoattack", verdict=True
    )
    assert found.success.any()
    assert torch.equal(found.success, model(found.x_adv).argmax(dim=1) != labels)


# The stamp --------------------------------------------------------------------------------------------------------


def test_the_standard_versions_are_the_published_ones():
    budgets = {
        ("standard", "Linf"): [("apgd-ce", 100, 1, None), ("apgd-t", 100, 1, 9), ("fab-t", 100, 1, 9)],
        ("standard", "L2"): [("apgd-ce", 100, 1, None), ("apgd-t", 100, 1, 9), ("fab-t", 100, 1, 9)],
        ("standard", "L1"): [("apgd-ce", 100, 5, None), ("apgd-t", 100, 1, 5), ("fab-t", 100, 1, 9)],
        ("rand", "Linf"): [("apgd-ce", 100, 1, None), ("apgd-dlr", 100, 1, None)],
        ("plus", "Linf"): [
            ("apgd-ce", 100, 5, None), ("apgd-dlr", 100, 5, None), ("fab", 100, 5, None), ("apgd-t", 100, 1, 9),
            ("fab-t", 100, 1, 9),
        ],
    }  # fmt: skip
    for (version, norm), expected in budgets.items():
        composition = composition_of(version, norm, 10)
        by_gradient = [
            (name, options["steps"], options["restarts"], options.get("target_classes"))
            for name, options in composition
            if name != "square"
        ]
        assert by_gradient == expected
        squares = [options for name, options in composition if name == "square"]
        assert squares == ([] if version == "rand" else [{"queries": 5000, "restarts": 1, "reach_edge": False}])
        assert all(options.get("eot", 1) == (20 if version == "rand" else 1) for _, options in composition)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_the_standard_versions_have_the_budgets_that_the_official_code_sets(norm):
    package = pytest.importorskip("pyautoattack", reason="reads the official settings")
    for version in ("standard", "plus", "rand"):
        suite = package.AutoAttack(nn.Identity(), norm=norm, eps=0.1, version=version)
        composition = dict(composition_of(version, norm, 10))
        assert [*suite.attacks_to_run] == [*composition]
        held = {
            "apgd-ce": suite.apgd, "apgd-dlr": suite.apgd, "apgd-t": suite.apgd_targeted, "fab": suite.fab,
            "fab-t": suite.fab,
        }  # fmt: skip
        for name, attack in held.items():
            if name in composition:
                options = composition[name]
                assert attack.n_iter == options["steps"]
                assert name == "fab-t" or attack.n_restarts == options["restarts"]
                assert getattr(attack, "eot_iter", 1) == options.get("eot", 1)
                assert getattr(attack, "use_largereps", False) == options.get("from_larger_eps", False)
                assert "target_classes" not in options or attack.n_target_classes == options["target_classes"]
        if "square" in composition:
            assert suite.square.n_queries == composition["square"]["queries"]


STANDARD = Protocol(Linf(8 / 255), 10, composition_of("standard", "Linf", 10))


def changed(place, **options):
    composition = list(STANDARD.composition)
    name, before = composition[place]
    composition[place] = (name, {**before, **options})
    return dataclasses.replace(STANDARD, composition=tuple(composition))


def test_only_the_published_settings_carry_the_published_name():
    assert STANDARD.name == "AutoAttack standard, Linf(eps=8/255)"
    others = [
        changed(0, steps=10),
        changed(0, restarts=2),
        changed(1, target_classes=8),
        changed(1, loss="ce"),
        changed(2, steps=99),
        changed(3, queries=1000),
        changed(3, reach_edge=True),
        dataclasses.replace(STANDARD, composition=STANDARD.composition[:3]),
        dataclasses.replace(STANDARD, composition=STANDARD.composition[::-1]),
        dataclasses.replace(STANDARD, threat=Linf(8 / 255, bounds=(-1.0, 1.0))),
        dataclasses.replace(STANDARD, threat=Linf(torch.full((3,), 8 / 255))),
        dataclasses.replace(STANDARD, threat=L1(12)),  # has settings of its own
    ]
    for protocol in others:
        assert protocol.version == "custom"
        assert protocol.name.startswith("custom: ")
    prints = [STANDARD, dataclasses.replace(STANDARD, threat=Linf(4 / 255)), *others]
    assert len({protocol.fingerprint for protocol in prints}) == len(prints)
    assert dataclasses.replace(STANDARD, classes=100).version == "standard"


def test_the_stamp_is_json_with_versions_and_a_fingerprint():
    stamp = json.loads(json.dumps(STANDARD.to_dict()))
    assert stamp["version"] == "standard"
    assert stamp["norm"] == "Linf"
    assert stamp["eps"] == 8 / 255
    assert stamp["attacks"][3] == ["square", {"queries": 5000, "reach_edge": False, "restarts": 1}]
    assert stamp["fingerprint"] == STANDARD.fingerprint
    assert {"torch", "perceptual_at", "python"} <= set(stamp["versions"])


def test_a_list_takes_the_published_settings_but_for_what_it_changes():
    model, x, labels = Pointwise(), images(4), torch.zeros(4, dtype=torch.long)
    found = auto_attack(model, x, labels, Linf(0.01), version=["apgd-ce", ("square", {"queries": 5})], verdict=True)
    composition = dict(found.protocol.composition)
    assert composition["apgd-ce"] == {"steps": 100, "restarts": 1}
    assert composition["square"] == {"queries": 5, "restarts": 1, "reach_edge": False}
    assert found.protocol.name == "custom: apgd-ce + square, Linf(eps=0.01)"


# Few classes ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3, 4, 5, 9])
def test_few_classes_are_attacked_in_earnest_and_the_protocol_says_how(classes):
    model, x, labels = robust_digits(classes)
    x, labels = x[:100], labels[:100]
    version = [
        ("apgd-ce", {"steps": 20}), ("apgd-dlr", {"steps": 20, "restarts": 1}), ("apgd-t", {"steps": 20}),
        ("fab-t", {"steps": 20}),
    ]  # fmt: skip
    found = auto_attack(model, x, labels, Linf(0.2), version=version, verdict=True, generator=numbers(x))
    assert torch.equal(found.success, model(found.x_adv).argmax(dim=1) != labels)
    strongest = auto_attack(
        model, x, labels, Linf(0.2), verdict=True, generator=numbers(x),
        version=[("apgd-ce", {"steps": 100, "restarts": 4}), ("fab", {"steps": 40, "restarts": 2})],
    )  # fmt: skip
    assert found.success.sum() >= strongest.success.sum() - 3
    said = " ".join(found.protocol.notes)
    assert ("margin in place of DLR" in said) == (classes < 4)
    assert ("in place of targeted DLR" in said) == (classes < 4)
    assert f"at most {classes - 1} target classes" in said
    assert dict(found.protocol.composition)["apgd-t"]["target_classes"] == classes - 1


def test_with_three_classes_the_margin_is_ascended_in_place_of_dlr():
    model, x = Net(classes=3).eval(), images(40)
    labels = model(x).argmax(dim=1)
    threat, options = L2(0.3, projection="ball_box"), {"steps": 5, "generator": numbers(x).fork(1)}
    by_margin, by_ratio = (apgd(model, x, labels, threat, loss=loss, verdict=True, **options) for loss in (margin, dlr))
    both = by_margin.success & by_ratio.success
    assert not torch.equal(by_margin.x_adv[both], by_ratio.x_adv[both])
    version = [("apgd-dlr", {"steps": 5, "restarts": 1})]
    found = auto_attack(model, x, labels, L2(0.3), version=version, verdict=True, generator=numbers(x))
    assert torch.equal(found.x_adv[found.success], by_margin.x_adv[by_margin.success])
    assert found.success.any()


class Prototypes(nn.Module):
    """The nearest of 200 random images wins: robust as far as half the way to the next one."""

    def __init__(self):
        super().__init__()
        self.images = uniform(0, 200, 64, dtype=torch.float32)

    def forward(self, x):
        return 2 * x.flatten(1) @ self.images.T - self.images.square().sum(dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["native", "pyautoattack"])
def test_two_hundred_classes_are_attacked_as_the_geometry_says(backend):
    if backend == "pyautoattack":
        pytest.importorskip("pyautoattack", reason="runs the official code")
    model, labels = Prototypes(), torch.arange(0, 200, 4)
    x = (model.images[labels] + 0.1 * uniform(1, 50, 64, dtype=torch.float32) - 0.05).clamp(0, 1).reshape(-1, 1, 8, 8)
    assert torch.equal(model(x).argmax(dim=1), labels)
    # The plane between own image and another is reached at (z_y - z_k) / |w|, in the dual norm.
    weights = 2 * (model.images[labels][:, None] - model.images)
    gaps = model(x).gather(1, labels[:, None]) - model(x)
    distances = (gaps / weights.norm(dim=2)).scatter(1, labels[:, None], float("inf")).amin(dim=1)
    threat = L2(float(distances.median()), bounds=(0.0, 1.0))
    version = [("apgd-ce", {"steps": 20}), ("apgd-t", {"steps": 20}), ("fab-t", {"steps": 20})]
    found = auto_attack(model, x, labels, threat, version=version, backend=backend, verdict=True, generator=numbers(x))
    assert found.protocol.notes == (() if backend == "native" else (official.NOTE,))
    # Inside the box the way is longer: nobody falls before the plane, and most that could, do.
    assert not found.success[distances > threat.eps * 1.001].any()
    assert found.success.sum() >= 8


@pytest.mark.parametrize("classes", [10, 200])
def test_many_classes_have_nine_targets(classes):
    x = images(3)
    found = auto_attack(Net(classes=classes).eval(), x, classes_of(3), Linf(0.001), version=QUICK[:2], verdict=True)
    assert found.protocol.notes == ()
    assert dict(composition_of("standard", "Linf", classes))["apgd-t"]["target_classes"] == 9


# Verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("threat", [Linf(0.08), L2(0.4), L1(1.0), Linf(torch.linspace(0.01, 0.2, 40))], ids=repr)
def test_a_verdict_is_true_and_says_who_broke_the_sample(threat):
    model, x = Net().eval(), images(40)
    labels = model(x).argmax(dim=1)
    labels[::7] = (labels[::7] + 1) % 5  # clean mistakes
    found = auto_attack(model, x, labels, threat, version=QUICK, verdict=True, batch_size=7, generator=generator(0))
    assert (threat.norm(found.x_adv - x) <= threat.eps).all()
    assert torch.equal(found.success, model(found.x_adv).argmax(dim=1) != labels)
    assert torch.equal(found.x_adv[found.robust], x[found.robust])
    assert (found.success[::7] & (found.attack[::7] == -1) & (found.step[::7] == 0)).all()
    assert torch.equal(found.x_adv[::7], x[::7])
    assert (found.attack[found.robust] == -1).all()
    assert found.attack.max() < 4
    shares = list(found.robust_after.values())
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1 - 6 / 40
    assert shares[-1] == found.robust.double().mean()
    assert (found.gradients[::7] == 0).all()
    # clean once here, and once in each of the four attacks, beside their own passes
    if not isinstance(threat, L1):  # whose published settings are five restarts in three balls
        assert (found.forwards[found.robust] == 1 + (1 + 21) + (1 + 3 * 21) + (1 + 3 * 40) + (1 + 61)).all()
    plain = auto_attack(model, x, labels, threat, version=QUICK, batch_size=40, generator=generator(0))
    assert torch.equal(model(plain).argmax(dim=1) != labels, found.success)


def test_an_attack_draws_the_same_numbers_in_any_company():
    model, x = Pointwise(), images(12)
    labels = model(x).argmax(dim=1)
    alone = auto_attack(model, x, labels, L2(0.02), version=QUICK[3:], verdict=True, generator=numbers(x))
    after = auto_attack(model, x, labels, L2(0.02), version=QUICK[:1] + QUICK[3:], verdict=True, generator=numbers(x))
    both = after.attack != 0
    assert torch.equal(alone.x_adv[both & alone.success], after.x_adv[both & alone.success])


@pytest.mark.slow
def test_in_float32_batches_flip_next_to_no_verdict():
    """Kernels round otherwise in batches of another size; in float64, and with kernels that do not, nothing changes."""
    model, x, labels = robust_digits()
    x, labels = x[:150], labels[:150]
    in_order, shuffled = torch.arange(150), torch.randperm(150, generator=generator(0))

    def verdicts(f, x, order=in_order, batch_size=150):
        found = auto_attack(
            f, x[order], labels[order], Linf(0.15), version=QUICK[1:3], batch_size=batch_size, verdict=True,
            generator=numbers(x).take(order),
        )  # fmt: skip
        return torch.empty_like(found.success).index_put((order,), found.success)

    whole = verdicts(model, x)
    for others in (verdicts(model, x, batch_size=20), verdicts(model, x, order=shuffled)):
        assert (whole != others).sum() <= 1
    double = type(model)(width=8).double().eval()
    double.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    whole = verdicts(double, x.double())
    for others in (verdicts(double, x.double(), batch_size=20), verdicts(double, x.double(), order=shuffled)):
        assert torch.equal(whole, others)


def test_an_empty_batch_is_nothing():
    x = images()[:0]
    assert auto_attack(Net(), x, classes_of()[:0], Linf(0.1)).shape == x.shape
    found = auto_attack(Net(), x, classes_of()[:0], Linf(0.1), verdict=True)
    assert len(found) == 0
    assert found.warnings == ()


# Warnings ---------------------------------------------------------------------------------------------------------


def warnings_of(model, x, labels, **options):
    options = {"version": [("apgd-ce", {"steps": 3}), ("square", {"queries": 60})], **options}
    return " ".join(auto_attack(model, x, labels, Linf(0.1), verdict=True, **options).warnings)


@pytest.mark.slow
def test_an_honest_model_gives_no_warning():
    model, x, labels = robust_digits()
    assert (
        warnings_of(model, x[:60], labels[:60], version=[("apgd-ce", {"steps": 30}), ("square", {"queries": 30})]) == ""
    )


@pytest.mark.slow
def test_models_that_deceive_are_found_out():
    model, x = Net(dtype=torch.float32).eval(), images(20, dtype=torch.float32)
    labels = model(x).argmax(dim=1)

    def noisy(z):
        return model(z + 0.1 * torch.randn(z.shape))

    def saturated(z):
        return 1e4 * model(z)

    def adapts(z):
        with torch.enable_grad():
            shift = torch.zeros_like(z, requires_grad=True)
            (grad,) = torch.autograd.grad(model(z.detach() + shift).sum(), shift)
        return model(z + 0.001 * grad)

    with torch.random.fork_rng(devices=[]):
        said = warnings_of(noisy, x, labels)
        assert "the model is random" in said
        assert 'use version="rand"' in said
        assert "the model is random" not in warnings_of(noisy, x, labels, version="rand", generator=generator(0))
    assert "probabilities, not logits" in warnings_of(lambda z: model(z).softmax(dim=1), x, labels)
    assert "gradient of the cross entropy is exactly zero" in warnings_of(saturated, x, labels)
    assert "computes gradients in its forward pass" in warnings_of(adapts, x, labels)
    rounded = warnings_of(lambda z: model((8 * z).round() / 8 + 0 * z), x, labels)
    assert "gradient of the margin is exactly zero for 20 of 20 samples" in rounded
    assert "Square, which uses no gradients, broke" in rounded


def test_the_official_code_is_heard_beside_our_own_warnings():
    pytest.importorskip("pyautoattack", reason="runs the official code")
    model, x = Net(dtype=torch.float32).eval(), images(20, dtype=torch.float32)
    labels = model(x).argmax(dim=1)
    options = {"version": [("apgd-dlr", {"steps": 3})], "backend": "pyautoattack"}
    with torch.random.fork_rng(devices=[]):
        said = warnings_of(lambda z: model(z + 0.1 * torch.randn(z.shape)), x, labels, **options)
    assert "it seems to be a randomized defense" in said
    assert "the model is random" in said
    said = warnings_of(lambda z: model(z).softmax(dim=1), x, labels, **options)
    assert "the output is a probability distribution" in said
    assert "probabilities, not logits" in said
    said = warnings_of(lambda z: model((8 * z).round() / 8 + 0 * z), x, labels, **options)
    assert "points with zero gradient" not in said  # which single samples set off; ours goes by significance
    assert "gradient of the margin is exactly zero" in said


# Malformed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"version": "fast"}, ValueError, "`version` must be one of 'standard', 'plus', 'rand', 'thorough' or a list"),
        ({"version": []}, TypeError, "`version` must be a name or a list of attacks"),
        ({"version": 3}, TypeError, "`version` must be a name or a list of attacks"),
        ({"version": ["pgd"]}, ValueError, "an attack in `version` must be one of 'apgd-ce'"),
        ({"version": [("square", 3, 4)]}, ValueError, "an attack in `version` must be one of"),
        ({"backend": "art"}, ValueError, "`backend` must be one of 'native', 'pyautoattack'"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
        ({"model_mode": "train"}, ValueError, "`model_mode` must be one of"),
        ({"generator": 0}, TypeError, "`generator` must be a torch.Generator"),
        ({"labels": torch.rand(6, 5)}, TypeError, "`labels` must be integer class indices"),
        ({"labels": classes_of() + 5}, ValueError, r"`labels` must lie in \[0, 4\]"),
        ({"x": images() * 4 - 2}, ValueError, "must lie in the bounds"),
        ({"x": torch.full((6, 3, 2, 2), float("nan"))}, ValueError, "contains NaN"),
        ({"threat": Linf}, TypeError, "`threat` must be a threat model"),
        ({"model": nn.Flatten(0)}, ValueError, "`model` must return logits of shape"),
    ],
    ids=words,
)
def test_malformed_calls_are_refused(options, error, message):
    given = {"model": Net(), "x": images(), "labels": classes_of(), "threat": Linf(0.1), **options}
    positional = [given.pop(name) for name in ("model", "x", "labels", "threat")]
    with pytest.raises(error, match=f"^auto_attack: .*{message}"):
        auto_attack(*positional, **given)


def test_threats_without_a_form_are_refused():
    class FirstEntry:
        eps, bounds = 0.1, (0.0, 1.0)
        project = steepest = random_start = norm = scaled = lambda self, *_, **__: None

    with pytest.raises(TypeError, match=r"^auto_attack: `threat` must be Linf, L2 or L1"):
        auto_attack(Net(), images(), classes_of(), FirstEntry())


def test_a_subclass_of_a_ball_is_attacked_but_its_result_has_no_published_name():
    class Half(Linf):
        pass

    found = auto_attack(Net(), images(), classes_of(), Half(0.1), verdict=True, version=[("square", {"queries": 5})])
    assert found.protocol.name.startswith("custom")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("apgd-ce", {"rho": 7}),
        ("apgd-dlr", {"loss": 3}),
        ("apgd-ce", {"from_larger_eps": True}),
        ("apgd-t", {"loss": margin}),
        ("apgd-t", {"target_classes": None}),
        ("fab", {"overshoot": 0.5}),
        ("square", {"p_init": "x"}),
        ("square", {"reach_edge": 3}),
        ("surrogate", {"blend": 2}),
    ],
)
def test_options_of_every_attack_are_looked_at_before_the_first_pass(name, options):
    def unused(x):
        pytest.fail("a pass was made")

    (option,) = options
    with pytest.raises((TypeError, ValueError), match=f"^auto_attack: .*`{option}`"):
        auto_attack(unused, images(), classes_of(), Linf(0.1), version=["fab", (name, options)])


@pytest.mark.parametrize(
    ("name", "loss", "message"),
    [
        ("square", lambda logits, labels: logits.sum(), "^auto_attack: `loss` must return one value per sample"),
        ("apgd-t", lambda logits, labels, targets: logits, "^auto_attack: `loss` must return one value per sample"),
        ("apgd-dlr", lambda logits, labels: logits @ logits, "cannot be multiplied"),
        ("apgd-ce", kl_to(torch.zeros(7, 5)), "^auto_attack: `loss`=kl_to.* holds 7 predictions and `labels` are 6"),
        ("square", kl_to(torch.zeros(3, 5)), "^auto_attack: `loss`=kl_to.* holds 3 predictions and `labels` are 6"),
    ],
)
def test_losses_of_every_attack_are_tried_before_the_first_attack(name, loss, message):
    net = Net()

    def without_gradients(x):
        assert not x.requires_grad, "an attack has begun"
        return net(x)

    with pytest.raises((RuntimeError, ValueError), match=message):
        auto_attack(without_gradients, images(), classes_of(), Linf(0.1), version=["fab", (name, {"loss": loss})])


def test_what_a_model_says_when_it_fails_is_left_as_it_is():
    def model(x):
        raise ValueError("sensor 3: no signal")

    with pytest.raises(ValueError, match=r"^sensor 3: no signal"):
        auto_attack(model, images(), classes_of(), Linf(0.1), version=["apgd-ce"])


def test_options_of_an_attack_that_do_not_exist_are_refused():
    x = uniform(0, 2, 3, 2, 2)
    with pytest.raises(ValueError, match=r"^auto_attack: 'apgd-ce' in `version` takes the options .*, got 'stepz'"):
        auto_attack(Pointwise(), x, Pointwise()(x).argmax(dim=1), Linf(0.1), version=[("apgd-ce", {"stepz": 3})])
