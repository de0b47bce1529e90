"""Networks with attention: theory takes derivatives that torch's fused kernels do not have."""

import pytest
import torch
from torch import nn

from perceptual_at import theory

X, DELTA = torch.rand(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 0.1
ALPHAS = [0.25, 0.5]


class Fused(nn.Module):
    """Attention over four tokens, by one of torch's ways."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out, self.way = nn.Linear(4, 8), nn.Linear(8, 3), way
        self.heads = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
        self.double().eval()

    def forward(self, x):
        tokens = self.embed(x.reshape(len(x), 4, 4))
        if self.way == "function":
            tokens = nn.functional.scaled_dot_product_attention(tokens[:, None], tokens[:, None], tokens[:, None])[:, 0]
        elif self.way == "written out":
            tokens = (tokens @ tokens.mT / 8**0.5).softmax(dim=-1) @ tokens
        elif self.way == "module":
            tokens = self.heads(tokens, tokens, tokens, need_weights=False)[0]
        else:
            tokens = self.layer(tokens)
        return self.out(tokens.mean(dim=1))


CALLS = {
    "taylor_coefficients": lambda h: theory.taylor_coefficients(h, X, DELTA * X),
    "directional_second_derivative": lambda h: theory.directional_second_derivative(h, X, DELTA * X, ALPHAS),
    "peano_identity": lambda h: theory.peano_identity(h, X, DELTA * X, ALPHAS),
    "mean_jacobian_identity": lambda h: theory.mean_jacobian_identity(h, X, DELTA * X, ALPHAS),
    "directional_jacobian": lambda h: theory.directional_jacobian(h, X, DELTA * X, ALPHAS),
    "power_jacobian_gap": lambda h: theory.power_jacobian_gap(h, X, DELTA * X, ALPHAS),
    "mixup_identity": lambda h: theory.mixup_identity(h, X, X.flip(0), mix=0.3),
    "hessian_is_vacuous": lambda h: theory.hessian_is_vacuous(h, X, DELTA * X),
}


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [one for part in value for one in tensors(part)] if isinstance(value, tuple) else [torch.tensor(value)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("way", ["function", "module", "layer"])
def test_fused_attention_has_all_derivatives(name, way):
    assert all(bool(torch.isfinite(one).all()) for one in tensors(CALLS[name](Fused(way))))


@pytest.mark.parametrize("name", CALLS)
def test_they_are_those_of_attention_written_out(name):
    for fused, plain in zip(
        tensors(CALLS[name](Fused("function"))), tensors(CALLS[name](Fused("written out"))), strict=True
    ):
        assert torch.allclose(fused.double(), plain.double(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", ["function", "module"])
def test_attention_is_not_piecewise_linear(way):
    with pytest.raises(ValueError, match="so it is not piecewise linear"):
        theory.kinks(Fused(way), X, DELTA * X)
