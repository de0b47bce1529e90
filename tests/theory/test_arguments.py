"""Whatever a theory function is given, it speaks in its own name and takes the numbers and dtypes of everybody."""

import inspect

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from perceptual_at import theory

X = torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
PARTS = {
    "x": X, "x1": X, "x2": X.flip(0), "delta": 0.1 * X, "delta1": 0.1 * X, "delta2": -0.1 * X, "u": X, "v": 0.1 * X,
    "alphas": 0.5, "mix": 0.25, "lipschitz": 2.0, "curvature": 1.0, "eps": 0.25, "sigma": 1.0, "c": 0.5, "s": 0.5,
    "d": 10, "w": X, "theta": X[0], "labels": torch.tensor([1, -1]), "unlabeled": X, "coefficients": torch.rand(3, 2),
}  # fmt: skip
NAMES = [name for name in theory.__all__ if name[0].islower()]


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(), nn.Linear(4, 2)).eval().to(dtype)


def arguments(name):
    parts = PARTS | {"h": net(), "model": net()} | ({"unlabeled": 5} if name == "sample_estimators" else {})
    wanted = inspect.signature(getattr(theory, name)).parameters.values()
    return {one.name: parts[one.name] for one in wanted if one.default is one.empty or one.name == "curvature"}


BROKEN = {
    "none": None,
    "text": "abc",
    "shape": torch.rand(5, 7, dtype=torch.float64),
    "mode": nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).double(),
    "pairs": lambda x: (x, x),
    "batch": lambda x: x.sum(),
    "class": nn.Flatten,
    "list": nn.ModuleList([nn.Flatten()]),
    "whole numbers": lambda x: (9 * x).long(),
}
NOT_BROKEN = {
    ("batch_jacobian", "x", "shape"), ("linf_to_l2_norm", "x", "shape"), ("taylor_residual", "coefficients", "shape"),
    ("predicted_error", "unlabeled", "none"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_is_wrong_is_said_in_the_name_of_who_was_called(name):
    given = arguments(name)
    for argument in given:
        for what, wrong in BROKEN.items():
            if (name, argument, what) in NOT_BROKEN or (argument == "curvature" and wrong is None):
                continue
            with pytest.raises((TypeError, ValueError), match=rf"^{name}: "):
                getattr(theory, name)(**given | {argument: wrong})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["jacobian_gap", "directional_gap", "jacobian_gap_bound", "local_lipschitz_bound"])
def test_spectral_norms_exist_in_half_precision(name, dtype):
    given = {**arguments(name), "h": net()}
    expected = getattr(theory, name)(**given)
    half = {key: value.to(dtype) if torch.is_tensor(value) else value for key, value in given.items()}
    found = getattr(theory, name)(**half | {"h": net(dtype)})
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=0.05, atol=0.05)


def test_places_are_numbers_of_every_kind():
    numpy = pytest.importorskip("numpy")
    expected = theory.segment_residual(net(), X, 0.1 * X, 0.5)
    for alpha in (numpy.float32(0.5), numpy.float64(0.5), numpy.array([0.5]), torch.tensor(0.5), [0.5]):
        assert torch.equal(theory.segment_residual(net(), X, 0.1 * X, alpha), expected)
    with pytest.raises(ValueError, match=r"mixup_identity: `mix` must be one number, got shape \(2,\)"):
        theory.mixup_identity(net(), X, X.flip(0), torch.tensor([0.25, 0.5]))
    with pytest.raises(
        ValueError, match=r"residual_certificate: `variation` must be of shape \(2,\), got shape \(3,\)"
    ):
        theory.residual_certificate(net(), X, X, variation=torch.ones(3))


class Recurrent(nn.Module):
    """A layer that gives its outputs and its states, then a linear one."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.GRU(1, 4, batch_first=True), nn.Linear(4, 2)
        self.double().eval()

    def forward(self, x):
        return self.last(self.first(x[:, :, None])[0][:, -1])


def test_the_first_tensor_of_a_layer_that_gives_several_counts():
    model = Recurrent()
    found = theory.layer_residuals(model, X, 0.1 * X, 0.5)
    values = [model.first(x[:, :, None])[0] for x in (X, 1.05 * X, 1.1 * X)]
    torch.testing.assert_close(found["first"][0], values[1] - (values[0] + values[2]) / 2)
    assert list(found) == ["first", "last"]
    attention = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double().eval()
    tokens = torch.rand(2, 3, 4, dtype=torch.float64)
    found = theory.layer_residuals(attention, tokens, 0.1 * tokens, 0.5, layers=["self_attn"])
    assert found["self_attn"].shape == (1, 2, 3, 4)


def test_a_layer_without_forward_mode_is_named_with_a_way_out():
    def recurrent(x):
        raise NotImplementedError("Trying to use forward AD with mkldnn_rnn_layer that does not support it.\nMore.")

    with pytest.raises(NotImplementedError, match=r"^directional_jacobian: `h` .* does not support it. .*mkldnn.flags"):
        theory.directional_jacobian(recurrent, X, X, 0.5)


class Older(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Onward(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize(("h", "words"), [
    (Older.apply, "holds a torch.autograd.Function without `setup_context`"),
    (Onward.apply, "holds a torch.autograd.Function without `jvp`"),
    (lambda x: checkpoint(torch.sin, x, use_reentrant=True), "uses torch.utils.checkpoint with use_reentrant=True"),
], ids=["without a context", "without forward mode", "reentrant"])  # fmt: skip
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_what_has_no_forward_mode_is_said(h, words):
    with pytest.raises(NotImplementedError, match=f"^directional_jacobian: `h` .*{words}"):
        theory.directional_jacobian(h, X, X, 0.5)


def test_checkpoints_have_no_derivative_by_torch_func():
    with pytest.raises(NotImplementedError, match=r"^batch_jacobian: `h` uses .*checkpoint, .* switch it off"):
        theory.batch_jacobian(lambda x: checkpoint(torch.sin, x, use_reentrant=False), X)


@pytest.mark.parametrize("name", [name for name in NAMES if {"h", "model"} & arguments(name).keys()])
def test_a_batch_may_be_empty(name):
    given = arguments(name)
    empty = {key: value[:0] if torch.is_tensor(value) else value for key, value in given.items()}
    if name == "hessian_is_vacuous":
        with pytest.raises(ValueError, match="hessian_is_vacuous: `x` must hold a sample"):
            theory.hessian_is_vacuous(**empty)
        return
    full, none = (getattr(theory, name)(**arguments) for arguments in (given, empty))
    if name == "kinks":
        assert none == ()
        return
    for one, other in zip(tree_leaves(full), tree_leaves(none), strict=True):
        assert other.shape == tuple(0 if place == one.shape.index(2) else n for place, n in enumerate(one.shape))
    assert not isinstance(none, theory.Identity) or none.error == 0
    assert not isinstance(none, theory.Inequality) or none.slack == torch.inf


def test_a_sample_may_be_one_number():
    x, delta = X[:, 0], 0.1 * X[:, 0]
    column = theory.batch_jacobian(torch.square, x[:, None])
    torch.testing.assert_close(theory.batch_jacobian(torch.square, x), column)
    gaps = theory.directional_gap(torch.square, x, delta, 0.5)
    torch.testing.assert_close(gaps, theory.directional_gap(torch.square, x[:, None], delta[:, None], 0.5))
    (found, _) = theory.kinks(torch.relu, x - x, delta - x)
    assert len(found.alphas) == 0
    assert theory.count_activation_flips(lambda x: torch.relu(x.sum(dim=1)), X - 1.5, 9 * X).tolist() == [1, 1]


@pytest.mark.parametrize("name", ["peano_identity", "mean_jacobian_identity", "hessian_identity", "mixup_identity",
                                  "adversarial_mixup_identity", "kink_identity"])  # fmt: skip
def test_a_map_may_answer_in_another_dtype_as_under_autocast(name):
    given = {key: value.float() if torch.is_tensor(value) else value for key, value in arguments(name).items()}
    given["h"] = net(torch.float32)
    expected = getattr(theory, name)(**given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = getattr(theory, name)(**given)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("size", [1e-40, 1e-25, 1e25])
def test_norms_of_jacobians_are_found_at_every_scale(size):
    h = net(torch.float32)
    x, delta = X.float(), X.float()
    for norm in (
        lambda h: theory.linf_to_l2_norm(h, x),
        lambda h: theory.local_lipschitz_bound(h, x, delta, [0.5, 1.0]).left,
    ):
        torch.testing.assert_close(norm(lambda x: size * h(x)).double(), size * norm(h).double(), rtol=1e-4, atol=0)


def test_a_jacobian_that_is_undefined_has_no_norm_and_one_of_zeros_a_gradient():
    holes = torch.tensor([torch.nan, 1.0], dtype=torch.float64)[:, None]
    steepest = theory.local_lipschitz_bound(lambda x: holes * x.square(), X, X, 1.0).left
    assert steepest.isnan().tolist() == [True, False]
    weight = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    theory.jacobian_gap(lambda x: weight * x.square(), X, X, [0.0, 1.0]).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(3, dtype=torch.float64))


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(ValueError, match=r"taylor_coefficients: `alpha` must be one place, .* got 2 of them"):
        theory.taylor_coefficients(torch.tanh, X, X, alpha=[0.0, 0.5])
    for wrong in (2.0, torch.tensor([[0.5]])):
        with pytest.raises(ValueError, match=r"^taylor_coefficients: `alpha` must"):
            theory.taylor_coefficients(torch.tanh, X, X, alpha=wrong)
    with pytest.raises(ValueError, match=r"^segment_quotient: `alphas` must lie in"):
        theory.segment_quotient(torch.tanh, X, X, torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"^mixup_residual: `mix` must lie in"):
        theory.mixup_residual(torch.tanh, X, X, torch.tensor(1.5))
    for wrong in ([2.0], torch.tensor([1]), "abc"):
        with pytest.raises((TypeError, ValueError), match=r"^mean_jacobian_identity: `breaks` must"):
            theory.mean_jacobian_identity(torch.tanh, X, X, 0.5, breaks=wrong)
    with pytest.raises(ValueError, match=r"mixup_box: `bounds` must be numbers \(low, high\) with low < high"):
        theory.mixup_box(X, X, 0.5, eps=0.1, bounds=(1.0, 0.0))


def test_no_budget_makes_a_constant_map_about_the_attack():
    assert (theory.crossover_eps(lambda x: 0 * x + 1, X, X.flip(0), 0.5) == torch.inf).all()
