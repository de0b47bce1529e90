"""Networks with attention: theory takes derivatives that torch's fused kernels and fast paths do not have."""

import contextlib
import functools
import inspect

import pytest
import torch
from torch import nn

from perceptual_at import Linf, diagnostics, objectives, pgd, theory
from perceptual_at.models import VisionTransformer

X = torch.rand(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
OTHER, DELTA, ALPHAS = X.flip(0), 0.1 * X, [0.25, 0.5]


def heads(tokens, count=2):
    return tokens.unflatten(-1, (count, -1)).transpose(1, 2)


def written_out(q, k, v):
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1) @ v


class Attending(nn.Module):
    """Four tokens that look at each other in one of torch's ways, then a linear layer."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out, self.way = nn.Linear(4, 8), nn.Linear(8, 3), way
        layer = {"dim_feedforward": 16, "dropout": 0.0, "batch_first": True}
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, activation="relu" if "relu" in way else "gelu", **layer)
        self.first = nn.TransformerEncoderLayer(8, 2, activation="gelu", norm_first=True, **layer)
        self.encoder = nn.TransformerEncoder(self.layer, 2)
        self.decoder = nn.TransformerDecoderLayer(8, 2, **layer)
        self.double()

    def forward(self, x):
        tokens = self.embed(x.reshape(len(x), 4, 4))
        q = heads(tokens)
        fused = nn.functional.scaled_dot_product_attention
        mixed = {
            "written out": lambda: written_out(q, q, q).transpose(1, 2).flatten(2),
            "function": lambda: fused(q, q, q).transpose(1, 2).flatten(2),
            "causal": lambda: fused(q, q, q, is_causal=True).transpose(1, 2).flatten(2),
            "masked": lambda: fused(q, q, q, attn_mask=torch.eye(4, dtype=torch.bool)).transpose(1, 2).flatten(2),
            "module": lambda: self.attention(tokens, tokens, tokens, need_weights=False)[0],
            "module with weights": lambda: self.attention(tokens, tokens, tokens)[0],
            "layer": lambda: self.layer(tokens),
            "layer with relu": lambda: self.layer(tokens),
            "layer, norm first": lambda: self.first(tokens),
            "encoder": lambda: self.encoder(tokens),
            "encoder, padded": lambda: self.encoder(
                tokens, src_key_padding_mask=torch.zeros(len(x), 4, dtype=torch.bool)
            ),
            "decoder": lambda: self.decoder(tokens, tokens),
        }[self.way]()
        return self.out(mixed.mean(dim=1))


WAYS = [
    "function", "causal", "masked", "module", "module with weights", "layer", "layer with relu", "layer, norm first",
    "encoder", "encoder, padded", "decoder",
]  # fmt: skip
CALLS = {
    "segment_residual": lambda h: theory.segment_residual(h, X, DELTA, ALPHAS),
    "segment_quotient": lambda h: theory.segment_quotient(h, X, DELTA, ALPHAS),
    "norm_defect": lambda h: theory.norm_defect(h, X, DELTA, ALPHAS),
    "stewart_identity": lambda h: theory.stewart_identity(h, X, DELTA, ALPHAS),
    "layer_residuals": lambda h: tuple(theory.layer_residuals(h, X, DELTA, ALPHAS).values()),
    "taylor_coefficients": lambda h: theory.taylor_coefficients(h, X, DELTA),
    "directional_second_derivative": lambda h: theory.directional_second_derivative(h, X, DELTA, ALPHAS),
    "second_derivative": lambda h: theory.second_derivative(h, X, DELTA, OTHER),
    "second_difference": lambda h: theory.second_difference(h, X, DELTA, ALPHAS),
    "peano_identity": lambda h: theory.peano_identity(h, X, DELTA, ALPHAS),
    "mean_jacobian_identity": lambda h: theory.mean_jacobian_identity(h, X, DELTA, ALPHAS),
    "curvature_bound": lambda h: theory.curvature_bound(h, X, DELTA, ALPHAS),
    "slope_variation": lambda h: theory.slope_variation(h, X, DELTA),
    "residual_certificate": lambda h: theory.residual_certificate(h, X, DELTA, curvature=torch.ones(())),
    "hessian_is_vacuous": lambda h: theory.hessian_is_vacuous(h, X, DELTA),
    "directional_jacobian": lambda h: theory.directional_jacobian(h, X, DELTA, ALPHAS),
    "batch_jacobian": lambda h: theory.batch_jacobian(h, X),
    "jacobian_gap": lambda h: theory.jacobian_gap(h, X, DELTA, ALPHAS),
    "power_jacobian_gap": lambda h: theory.power_jacobian_gap(h, X, DELTA, ALPHAS),
    "directional_gap": lambda h: theory.directional_gap(h, X, DELTA, ALPHAS),
    "lipschitz_quotient": lambda h: theory.lipschitz_quotient(h, X, DELTA, ALPHAS),
    "jacobian_gap_bound": lambda h: theory.jacobian_gap_bound(h, X, DELTA, ALPHAS, lipschitz=1.0),
    "local_lipschitz_bound": lambda h: theory.local_lipschitz_bound(h, X, DELTA, ALPHAS),
    "hessian_identity": lambda h: theory.hessian_identity(h, X, DELTA, OTHER, ALPHAS, nodes=4),
    "linf_to_l2_norm": lambda h: theory.linf_to_l2_norm(h, X, steps=4),
    "mixup_residual": lambda h: theory.mixup_residual(h, X, OTHER, 0.3),
    "taylor_mixup_residual": lambda h: theory.taylor_mixup_residual(h, X, OTHER, 0.3),
    "mixup_identity": lambda h: theory.mixup_identity(h, X, OTHER, 0.3),
    "adversarial_first_order_term": lambda h: theory.adversarial_first_order_term(h, X, OTHER, DELTA, DELTA, 0.3),
    "adversarial_mixup_identity": lambda h: theory.adversarial_mixup_identity(h, X, OTHER, DELTA, DELTA, 0.3),
    "crossover_eps": lambda h: theory.crossover_eps(h, X, OTHER, 0.3, steps=4),
}
PIECEWISE_LINEAR = {
    "kinks": lambda h: theory.kinks(h, X, DELTA),
    "kink_identity": lambda h: theory.kink_identity(h, X, DELTA, ALPHAS),
}
FLIPS = "count_activation_flips"
every_way = pytest.mark.parametrize("way", WAYS)


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [one for part in value for one in tensors(part)] if isinstance(value, tuple) else [torch.tensor(value)]


def test_every_function_of_a_map_is_called_here():
    takes_a_map = {
        name
        for name in theory.__all__
        if name.islower() and {"h", "model"} & set(inspect.signature(getattr(theory, name)).parameters)
    }
    assert takes_a_map == {*CALLS, *PIECEWISE_LINEAR, FLIPS}


@pytest.mark.slow
@every_way
@pytest.mark.parametrize(
    ("training", "trainable", "recorded"),
    [
        (True, True, torch.enable_grad),
        (False, True, torch.enable_grad),
        (False, False, torch.enable_grad),
        (False, False, torch.no_grad),
        (False, True, torch.inference_mode),
    ],
    ids=["train", "eval", "frozen", "no_grad", "inference"],
)
def test_every_function_on_every_form_of_attention(way, training, trainable, recorded):
    h = Attending(way).train(training).requires_grad_(trainable)
    with recorded():
        for name, call in CALLS.items():
            assert all(bool(torch.isfinite(one).all()) for one in tensors(call(h))), name


@pytest.mark.parametrize("name", CALLS)
def test_inference_mode_changes_no_value(name):
    """In it, torch 2.6 has no derivatives, and gives zeros for them."""
    h = Attending("layer").eval()
    outside = tensors(CALLS[name](h))
    with torch.inference_mode():
        inside = tensors(CALLS[name](h))
    for a, b in zip(inside, outside, strict=True):
        torch.testing.assert_close(a.double(), b.detach().double(), rtol=1e-3, atol=1e-5)


@every_way
@pytest.mark.parametrize("name", ["directional_jacobian", "second_derivative", "layer_residuals", "batch_jacobian"])
def test_the_fast_path_of_eval_mode_is_not_taken(way, name):
    h = Attending(way).eval().requires_grad_(False)
    with torch.no_grad():
        assert all(bool(torch.isfinite(one).all()) for one in tensors(CALLS[name](h)))


@pytest.mark.parametrize("name", CALLS)
def test_they_are_those_of_attention_written_out(name):
    values = (tensors(CALLS[name](Attending(way).eval())) for way in ("function", "written out"))
    off = 1e-6 if name == "second_difference" else 1e-9  # which divides differences by 1e-6
    for fused, plain in zip(*values, strict=True):
        assert torch.allclose(fused.double(), plain.double(), rtol=off, atol=off / 1000)


@every_way
def test_the_modes_agree(way):
    h = Attending(way).requires_grad_(False)
    with torch.no_grad():
        found = [theory.second_derivative(h.train(training), X, DELTA, OTHER) for training in (True, False)]
    assert torch.allclose(*found, rtol=1e-9, atol=1e-12)


@every_way
@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_attention_is_not_piecewise_linear(way, name, frozen):
    h = Attending(way).eval().requires_grad_(not frozen)
    with torch.no_grad(), pytest.raises(ValueError, match=f"{name}: .* so it is not piecewise linear"):
        PIECEWISE_LINEAR[name](h)


@pytest.mark.parametrize("recorded", [contextlib.nullcontext, torch.no_grad])
def test_flips_of_its_relu_are_counted(recorded):
    h = Attending("layer with relu").eval().requires_grad_(False)
    with recorded():
        assert theory.count_activation_flips(h, X, 10 * DELTA).shape == (2,)
        with pytest.raises(ValueError, match="no ReLU-like activation"):
            theory.count_activation_flips(Attending("layer").eval(), X, DELTA)


def test_what_was_found_outside_stays():
    h = Attending("encoder").eval().requires_grad_(False)
    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()
    theory.batch_jacobian(h, X)
    with pytest.raises(RuntimeError, match="stop"):
        theory.batch_jacobian(lambda x: (_ for _ in ()).throw(RuntimeError("stop")), X)
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()) == before


@pytest.mark.slow
@every_way
@pytest.mark.filterwarnings("ignore:.*nested tensors")  # of torch's own fast path
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_diagnostics_on_attention(way, mode):
    h, labels = Attending(way).train(mode == "train"), torch.tensor([0, 1])
    x_adv = (X + DELTA).clamp(0, 1)
    assert diagnostics.perception_path(h, X, x_adv, ALPHAS).isfinite().all()
    gap = diagnostics.perception_gap(h, [(X, labels)], lambda model, x, labels: x + DELTA)
    assert gap.distance.isfinite().all()
    push = functools.partial(pgd, threat=Linf(0.1), steps=1, start="clean")
    assert diagnostics.attacked_by_group(h, X, labels, push, boundary="reduced").isfinite().all()


def test_vision_transformers_too():
    torch.manual_seed(0)
    h = VisionTransformer(1, 8, 2, num_classes=3, image_size=8).eval().double()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    assert theory.second_derivative(h, x, 0.1 * x, x).isfinite().all()


@every_way
def test_objectives_that_differentiate_twice(way):
    h, labels = Attending(way).train(), torch.tensor([0, 1])
    push = functools.partial(pgd, threat=Linf(0.1), steps=1, start="clean")
    loss, _ = objectives.grad_align(h, (X,), labels, push, threat=Linf(0.1), weight=0.2)
    loss.backward()
    assert h.embed.weight.grad.isfinite().all()


def test_dropout_in_train_mode_is_no_function():
    h = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double()
    x = X.reshape(2, 4, 4)
    with pytest.raises(ValueError, match=r"batch_jacobian: `self_attn` .* draws random numbers"):
        theory.batch_jacobian(h.train(), x)
    assert theory.batch_jacobian(h.eval(), x).isfinite().all()
