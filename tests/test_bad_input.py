"""Malformed calls: each is refused by an error that names the function and the argument, and changes nothing."""

import inspect
import math
import random
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from perceptual_at import (
    L1,
    L2,
    Linf,
    SampleGenerator,
    accuracy,
    apgd,
    attacks,
    boosted_cross_entropy,
    boundary_partition,
    call_with,
    consistency_loss,
    cosine_distance,
    diagnostics,
    dicar_loss,
    dlr,
    draw_beta,
    ema_update,
    evaluate,
    fgsm,
    frozen,
    interpolate,
    js_divergence,
    kl_divergence,
    kl_to,
    margin,
    mart_loss,
    mean_score,
    nrr,
    objectives,
    pgd,
    robust_perception_kl_loss,
    robust_perception_loss,
    sanity_checks,
    snapshot,
    square,
    squared_error,
    still_adversarial,
    theory,
    trades_loss,
    weighted_kl_loss,
)
from tests.strategies import integers, normal, uniform

THREAT = Linf(0.1)


class World:
    """A model in the middle of training and a batch; what must be as it was after a refused call."""

    def __init__(self):
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5))
        self.model[1].weight.requires_grad_(False)
        self.x = uniform(0, 6, 3, 2, 2, dtype=torch.float32)
        self.labels = integers(1, 6, below=5)
        self.z, self.z2, self.z3 = (normal(i, 6, 5, dtype=torch.float32) for i in range(3))
        self.predicted = self.model.eval()(self.x).argmax(dim=1)
        self.other = nn.Linear(2, 2)
        self.mask = torch.ones(6, dtype=torch.bool)
        self.average = snapshot(self.model)
        self.model.train()
        self.model[2].eval()

    def fingerprint(self):
        tensors = [
            self.x,
            self.labels,
            self.z,
            self.z2,
            self.z3,
            *self.average.values(),
            *self.model.state_dict().values(),
        ]
        return (
            [value.clone() for value in tensors],
            [module.training for module in self.model.modules()],
            [(p.requires_grad, p.grad) for p in self.model.parameters()],
            torch.get_rng_state(),
            str(np.random.get_state()),  # noqa: NPY002
            random.getstate(),
            torch.is_grad_enabled(),
        )


def unchanged(before, after):
    return all(
        all(torch.equal(a, b) for a, b in zip(x, y, strict=True)) if isinstance(x, list) and torch.is_tensor(x[0])
        else torch.equal(x, y) if torch.is_tensor(x)
        else x == y
        for x, y in zip(before, after, strict=True)
    )  # fmt: skip


def attack(function, **changed):
    """A call of an attack with one thing wrong; a lambda makes it from the world."""

    def call(w):
        given = {"model": w.model, "x": w.x, "labels": w.labels, "threat": THREAT} | {
            name: value(w) if callable(value) and getattr(value, "__name__", "") == "<lambda>" else value
            for name, value in changed.items()
        }
        function(given.pop("model"), given.pop("x"), given.pop("labels"), given.pop("threat"), **given)

    return call


def broken_model(output):
    """A model whose output is what `output` makes of right logits."""
    return lambda w: partial(lambda model, x: output(model(x)), w.model)


# Each row: the error, the words its message must say, in this order, and the call.
ROWS = [
    # Threat models
    (ValueError, "Linf eps 8 input range did you mean 8 / 255", lambda w: Linf(eps=8)),
    (ValueError, "Linf eps 2.5 input range", lambda w: Linf(2.5, bounds=(-1, 1))),
    *(
        (ValueError, f"{kind.__name__} `eps` {eps}", lambda w, kind=kind, eps=eps: kind(eps))
        for kind in (Linf, L2, L1)
        for eps in (-0.1, math.nan, math.inf)
    ),
    *(
        (TypeError, "Linf `eps` number", lambda w, eps=eps: Linf(eps))
        for eps in ("8/255", None, True, torch.tensor([1, 2]))
    ),
    (TypeError, "L2 `bounds` pair", lambda w: L2(0.5, bounds=(1.0,))),
    (TypeError, "L2 `bounds` pair None", lambda w: L2(0.5, bounds=None)),
    (ValueError, "L1 `bounds` low < high", lambda w: L1(0.5, bounds=(1, 0))),
    (ValueError, "L1 `bounds`", lambda w: L1(0.5, bounds=(math.nan, 1))),
    (ValueError, "Linf `bounds` numbers", lambda w: Linf(0.5, bounds=("0", "1"))),
    (ValueError, "L2 `projection` box_ball ball_box 'ball'", lambda w: L2(0.5, projection="ball")),
    (ValueError, "Linf.scaled `factor`", lambda w: THREAT.scaled(0.0)),
    (TypeError, "L2.scaled `factor`", lambda w: L2(0.5).scaled("2")),
    (ValueError, "Linf.project `x_adv` (6, 3, 2, 2) (2, 3, 2, 2)", lambda w: THREAT.project(w.x, w.x[:2])),
    (TypeError, "L2.project `x` floating torch.uint8", lambda w: L2(0.5).project(w.x, w.x.byte())),
    (ValueError, "L1.project `x_adv` cpu meta", lambda w: L1(0.5).project(w.x, w.x.to("meta"))),
    *(
        (TypeError, f"{type(t).__name__}.{name} floating torch.int64",
         lambda w, t=t, name=name: getattr(t, name)(w.labels[:, None]))
        for t in (THREAT, L2(0.5), L1(0.5)) for name in ("norm", "steepest", "random_start")
    ),
    (TypeError, "L2.random_start `generator` int", lambda w: L2(0.5).random_start(w.x, generator=7)),
    # The path
    (ValueError, "interpolate `x_adv` (6, 1, 2, 2)", lambda w: interpolate(w.x, w.x[:, :1], 0.5)),
    (ValueError, "interpolate `x_adv` meta", lambda w: interpolate(w.x, w.x.to("meta"), 0.5)),
    (ValueError, "interpolate `alpha` [0.0, 1.0] 1.5", lambda w: interpolate(w.x, w.x, 1.5)),
    (ValueError, "interpolate `alpha` [0.0, 1.0] -0.1", lambda w: interpolate(w.x, w.x, -0.1)),
    (ValueError, "interpolate `alpha` nan", lambda w: interpolate(w.x, w.x, math.nan)),
    (TypeError, "interpolate `alpha` number bool", lambda w: interpolate(w.x, w.x, True)),
    (ValueError, "interpolate `alpha` (6,) (3,)",
     lambda w: interpolate(w.x, w.x, torch.rand(3, generator=torch.Generator()))),
    (ValueError, "interpolate `alpha` floating torch.int64", lambda w: interpolate(w.x, w.x, w.labels)),
    (ValueError, "interpolate `alpha` meta", lambda w: interpolate(w.x, w.x, torch.full((6,), 0.5, device="meta"))),
    (TypeError, "interpolate `x` torch.uint8 x.float() / 255", lambda w: interpolate((255 * w.x).byte(), w.x, 0.5)),
    (TypeError, "interpolate `x` Tensor list", lambda w: interpolate([0.5], w.x, 0.5)),
    (ValueError, "draw_beta `concentration` 0.0", lambda w: draw_beta(concentration=0.0)),
    (TypeError, "draw_beta `concentration` str", lambda w: draw_beta(concentration="1")),
    (ValueError, "draw_beta `fold` 'none' 'min' 'max' 'both'", lambda w: draw_beta(fold="both")),
    (TypeError, "draw_beta `generator` int", lambda w: draw_beta(generator=0)),
    # Attacks
    *(
        row
        for function in (pgd, fgsm)
        for name in (function.__name__,)
        for row in (
            (TypeError, f"{name}: `x` Tensor list", attack(function, x=[[0.5]])),
            (TypeError, f"{name}: `x` floating torch.uint8 x.float() / 255",
             attack(function, x=lambda w: (255 * w.x).byte())),
            (TypeError, f"{name}: `x` floating torch.complex64", attack(function, x=lambda w: w.x + 0j)),
            (ValueError, f"{name}: `x` batch scalar", attack(function, x=lambda w: w.x[0, 0, 0, 0])),
            (ValueError, f"{name}: `x` bounds [0.0, 1.0] got values from -1 to 1 normalis",
             attack(function, x=lambda w: 4 * w.x - 2)),
            (ValueError, f"{name}: `x` bounds [0.0, 1.0] got values to 25", attack(function, x=lambda w: 255 * w.x)),
            (ValueError, f"{name}: `x` NaN or infinite", attack(function, x=lambda w: w.x.where(w.x > 0.1, math.nan))),
            (ValueError, f"{name}: `x` NaN or infinite", attack(function, x=lambda w: w.x.where(w.x > 0.1, -math.inf))),
            (TypeError, f"{name}: `labels` integer (6,) torch.float32",
             attack(function, labels=lambda w: w.labels.float())),
            (TypeError, f"{name}: `labels` integer (6,) torch.bool", attack(function, labels=lambda w: w.labels > 2)),
            (TypeError, f"{name}: `labels` Tensor list", attack(function, labels=[0] * 6)),
            (ValueError, f"{name}: `labels` (6,) (3,)", attack(function, labels=lambda w: w.labels[:3])),
            (ValueError, f"{name}: `labels` (6,) (6, 1)", attack(function, labels=lambda w: w.labels[:, None])),
            (ValueError, f"{name}: `labels` [0, 4] 5 classes got values",
             attack(function, labels=lambda w: w.labels + 3)),
            (ValueError, f"{name}: `labels` [0, 4] got values from -1",
             attack(function, labels=lambda w: w.labels - 1)),
            (ValueError, f"{name}: `labels` meta `x` cpu", attack(function, labels=lambda w: w.labels.to("meta"))),
            (ValueError, f"{name}: `labels` 2 rows 6 samples", attack(function, labels=lambda w: w.z[:2])),
            (ValueError, f"{name}: `labels` (6, 3) (6, 5)", attack(function, labels=lambda w: w.z[:, :3])),
            (TypeError, "margin: `labels` integer", attack(function, labels=lambda w: w.z, loss=margin)),
            (TypeError, f"{name}: `threat` Linf(8 / 255) got Linf", attack(function, threat=Linf)),
            (TypeError, f"{name}: `threat` Linf(8 / 255) got 0.031", attack(function, threat=8 / 255)),
            (TypeError, f"{name}: `threat` None", attack(function, threat=None)),
            (ValueError, f"{name}: `start` 'random' 'clean' 'zeros'", attack(function, start="zeros")),
            (ValueError, f"{name}: `start` 'random' 'clean' 0", attack(function, start=0)),
            (ValueError, f"{name}: `start` (2, 3, 2, 2) `x` (6, 3, 2, 2)", attack(function, start=lambda w: w.x[:2])),
            (TypeError, f"{name}: `start` floating", attack(function, start=lambda w: w.x.long())),
            (ValueError, f"{name}: `start` meta", attack(function, start=lambda w: w.x.to("meta"))),
            (ValueError, f"{name}: `start` NaN", attack(function, start=lambda w: w.x * math.nan)),
            (ValueError, f"{name}: `model_mode` 'eval' 'as_is' 'train'", attack(function, model_mode="train")),
            (TypeError, f"{name}: `model` callable str", attack(function, model="net")),
            (TypeError, f"{name}: `loss` str", attack(function, loss="ce")),
            (ValueError, f"{name}: `loss` (6,) shape () reduction='none'",
             attack(function, loss=functional.cross_entropy)),
            (TypeError, f"{name}: `model` tensor of logits tuple",
             attack(function, model=broken_model(lambda z: (z, z)))),
            (ValueError, f"{name}: `model` (6, K) shape (6,)", attack(function, model=broken_model(lambda z: z[:, 0]))),
            (ValueError, f"{name}: `model` K >= 2 (6, 1)", attack(function, model=broken_model(lambda z: z[:, :1]))),
            (ValueError, f"{name}: `model` (6, K) (4, 5)", attack(function, model=broken_model(lambda z: z[:4]))),
            (ValueError, f"{name}: model's output no gradient", attack(function, model=broken_model(torch.detach))),
            (ValueError, f"{name}: model's output no gradient",
             attack(function, model=lambda w: (lambda x, b=w.model[4].bias: b.expand(6, 5)))),
            (TypeError, "`generator` torch.Generator int", attack(function, start="random", generator=7)),
        )
    ),
    (ValueError, "pgd: `steps` at least 1 got 0", attack(pgd, steps=0)),
    (ValueError, "pgd: `steps` at least 1 got -3", attack(pgd, steps=-3)),
    (TypeError, "pgd: `steps` integer float 10.0", attack(pgd, steps=10.0)),
    (TypeError, "pgd: `steps` integer bool True", attack(pgd, steps=True)),
    (ValueError, "pgd: `step_size` 0.0", attack(pgd, step_size=0.0)),
    (ValueError, "pgd: `step_size` -0.1", attack(pgd, step_size=-0.1)),
    (ValueError, "pgd: `step_size` nan", attack(pgd, step_size=math.nan)),
    (TypeError, "pgd: `step_size` number str", attack(pgd, step_size="2/255")),
    (ValueError, "pgd: `keep` 'last' 'best' 'first'", attack(pgd, keep="first")),
    (ValueError, "pgd: `restarts` at least 1 got 0", attack(pgd, restarts=0)),
    (TypeError, "pgd: `restarts` integer bool", attack(pgd, restarts=True)),
    (TypeError, "pgd: `restarts` integer float", attack(pgd, restarts=2.0)),
    (ValueError, "pgd: `restarts` 2 no effect start", attack(pgd, restarts=2, start="clean")),
    (ValueError, "pgd: `restarts` 2 no effect start", attack(pgd, restarts=2, start=lambda w: w.x)),
    (TypeError, "frozen: `model` callable int", lambda w: frozen(3).__enter__()),
    (ValueError, "frozen: `model_mode` 'eval' 'as_is' 'train'",
     lambda w: frozen(w.model, model_mode="train").__enter__()),
    (ValueError, "kl_to: `reference_logits` (B, K) (5,)", lambda w: kl_to(w.z[0])),
    (TypeError, "kl_to: `reference_logits` floating", lambda w: kl_to(w.labels)),
    (ValueError, "(2, 5) (6, 5)", lambda w: kl_to(w.z)(w.z[:2], w.labels)),
    # Losses
    *(
        row
        for loss in (robust_perception_loss, robust_perception_kl_loss, partial(dicar_loss, mix=0.5))
        for name in (getattr(loss, "func", loss).__name__,)
        for row in (
            (ValueError, f"{name}: (6, 4) (6, 5) equal", lambda w, loss=loss: loss(w.z, w.z2[:, :4], w.z3)),
            (ValueError, f"{name}: (1, 5) (6, 5) equal", lambda w, loss=loss: loss(w.z, w.z2, w.z3[:1])),
            (ValueError, f"{name}: meta cpu device", lambda w, loss=loss: loss(w.z, w.z2, w.z3.to("meta"))),
            (TypeError, f"{name}: floating torch.int64", lambda w, loss=loss: loss(w.z, w.z2.long(), w.z3)),
            (TypeError, f"{name}: Tensor float", lambda w, loss=loss: loss(w.z, 0.5, w.z3)),
            (ValueError, f"{name}: `reduction` 'mean' 'sum' 'none' 'avg'",
             lambda w, loss=loss: loss(w.z, w.z2, w.z3, reduction="avg")),
            (ValueError, f"{name}: `reduction` None", lambda w, loss=loss: loss(w.z, w.z2, w.z3, reduction=None)),
        )
    ),
    *(
        (ValueError, f"robust_perception_loss: `alpha` (0.0, 1.0) {alpha}",
         lambda w, alpha=alpha: robust_perception_loss(w.z, w.z2, w.z3, alpha=alpha))
        for alpha in (0.0, 1.0, -0.5, 1.5, math.nan)
    ),
    *(
        (ValueError, f"robust_perception_loss: `alpha` [0.0, 1.0] {alpha}",
         lambda w, alpha=alpha: robust_perception_loss(w.z, w.z2, w.z3, alpha=alpha, form="interpolation"))
        for alpha in (-0.1, 1.1, math.inf)
    ),
    (TypeError, "robust_perception_loss: `alpha` number str",
     lambda w: robust_perception_loss(w.z, w.z2, w.z3, alpha="0.5")),
    (ValueError, "robust_perception_loss: `alpha` (6,) (3,)",
     lambda w: robust_perception_loss(w.z, w.z2, w.z3, alpha=torch.full((3,), 0.5))),
    (ValueError, "robust_perception_loss: `alpha` meta",
     lambda w: robust_perception_loss(w.z, w.z2, w.z3, alpha=torch.full((6,), 0.5, device="meta"))),
    (ValueError, "robust_perception_loss: `form` 'quotient' 'interpolation' 'paper'",
     lambda w: robust_perception_loss(w.z, w.z2, w.z3, form="paper")),
    (ValueError, "robust_perception_loss: `criterion` 'mse' 'kl' 'js' 'cosine' 'l2'",
     lambda w: robust_perception_loss(w.z, w.z2, w.z3, criterion="l2")),
    (ValueError, "robust_perception_loss: `criterion` None",
     lambda w: robust_perception_loss(w.z, w.z2, w.z3, criterion=None)),
    (ValueError, "robust_perception_loss: `criterion` per sample (6,) ()",
     lambda w: robust_perception_loss(w.z, w.z2, w.z3, criterion=functional.mse_loss)),
    ((TypeError, ValueError), "robust_perception_loss: `criterion` float",
     lambda w: robust_perception_loss(w.z, w.z2, w.z3, criterion=lambda a, b: 0.0)),
    *(
        (ValueError, "robust_perception_loss: `temperature` no effect `criterion`",
         lambda w, c=c: robust_perception_loss(w.z, w.z2, w.z3, criterion=c, temperature=0.5))
        for c in ("mse", "cosine", squared_error)
    ),
    (ValueError, "robust_perception_loss: `temperature` 0.0",
     lambda w: robust_perception_loss(w.z, w.z2, w.z3, criterion="js", temperature=0.0)),
    (ValueError, "robust_perception_kl_loss: `alpha` (0.0, 1.0] 0.0",
     lambda w: robust_perception_kl_loss(w.z, w.z2, w.z3, alpha=0.0)),
    (ValueError, "robust_perception_kl_loss: `alpha` (0.0, 1.0] 2",
     lambda w: robust_perception_kl_loss(w.z, w.z2, w.z3, alpha=2)),
    (ValueError, "robust_perception_kl_loss: `clean_logits` (B, K) (6,)",
     lambda w: robust_perception_kl_loss(w.z[:, 0], w.z[:, 0], w.z[:, 0])),
    (ValueError, "dicar_loss: `mix` [0.0, 1.0] 1.2", lambda w: dicar_loss(w.z, w.z2, w.z3, mix=1.2)),
    (ValueError, "dicar_loss: `mix` nan", lambda w: dicar_loss(w.z, w.z2, w.z3, mix=math.nan)),
    (ValueError, "dicar_loss: `mix` (6,) (6, 5)", lambda w: dicar_loss(w.z, w.z2, w.z3, mix=w.z)),
    (ValueError, "dicar_loss: `mix` meta",
     lambda w: dicar_loss(w.z, w.z2, w.z3, mix=torch.full((6,), 0.5, device="meta"))),
    (TypeError, "dicar_loss mix", lambda w: dicar_loss(w.z, w.z2, w.z3)),
    (ValueError, "dicar_loss: `space` 'probabilities' 'logits' 'prob'",
     lambda w: dicar_loss(w.z, w.z2, w.z3, mix=0.5, space="prob")),
    (ValueError, "dicar_loss: `average_over` 'selected' 'all' 'batch'",
     lambda w: dicar_loss(w.z, w.z2, w.z3, mix=0.5, average_over="batch")),
    (ValueError, "dicar_loss: `average_over` no effect `reduction` 'sum'",
     lambda w: dicar_loss(w.z, w.z2, w.z3, mix=0.5, average_over="all", reduction="sum")),
    (ValueError, "dicar_loss: `temperature` -1", lambda w: dicar_loss(w.z, w.z2, w.z3, mix=0.5, temperature=-1)),
    ((TypeError, ValueError), "dicar_loss: `mask` boolean (6,) torch.float32",
     lambda w: dicar_loss(w.z, w.z2, w.z3, mix=0.5, mask=w.mask.float())),
    ((TypeError, ValueError), "dicar_loss: `mask` boolean torch.int64",
     lambda w: dicar_loss(w.z, w.z2, w.z3, mix=0.5, mask=w.labels)),
    (ValueError, "dicar_loss: `mask` (6,) (6, 1)",
     lambda w: dicar_loss(w.z, w.z2, w.z3, mix=0.5, mask=w.mask[:, None])),
    (ValueError, "dicar_loss: `mask` meta", lambda w: dicar_loss(w.z, w.z2, w.z3, mix=0.5, mask=w.mask.to("meta"))),
    (TypeError, "dicar_loss: `mask` Tensor list", lambda w: dicar_loss(w.z, w.z2, w.z3, mix=0.5, mask=[True] * 6)),
    (ValueError, "consistency_loss: `temperature` 0", lambda w: consistency_loss(w.z, w.z2, temperature=0)),
    (TypeError, "consistency_loss: `temperature` bool", lambda w: consistency_loss(w.z, w.z2, temperature=True)),
    (ValueError, "consistency_loss: (5, 6) (6, 5)", lambda w: consistency_loss(w.z, w.z2.t())),
    (ValueError, "consistency_loss: K >= 2 (6, 1)", lambda w: consistency_loss(w.z[:, :1], w.z2[:, :1])),
    *(
        row
        for loss in (trades_loss, mart_loss, weighted_kl_loss)
        for name in (loss.__name__,)
        for row in (
            (ValueError, "(2, 5) (6, 5) equal", lambda w, loss=loss: loss(w.z, w.z2[:2], w.labels)),
            (ValueError, "meta cpu", lambda w, loss=loss: loss(w.z, w.z2.to("meta"), w.labels)),
            (TypeError, "floating torch.int64", lambda w, loss=loss: loss(w.labels, w.z, w.z2)),
            (ValueError, "`reduction` 'batchmean'",
             lambda w, loss=loss: loss(w.z, w.z2, w.labels, reduction="batchmean")),
        )
    ),
    *(
        row
        for loss, call in (
            (trades_loss, lambda w, y: trades_loss(w.z, w.z2, y)),
            (mart_loss, lambda w, y: mart_loss(w.z, w.z2, y)),
            (weighted_kl_loss, lambda w, y: weighted_kl_loss(w.z, w.z2, y)),
            (boosted_cross_entropy, lambda w, y: boosted_cross_entropy(w.z, y)),
            (boundary_partition, lambda w, y: boundary_partition(w.z, w.z2, y)),
            (accuracy, lambda w, y: accuracy(w.z, y)),
            (margin, lambda w, y: margin(w.z, y)),
            (dlr, lambda w, y: dlr(w.z, y)),
        )
        for name in (loss.__name__,)
        for row in (
            (TypeError, "`labels` integer (6,) torch.float32", lambda w, call=call: call(w, w.labels.float())),
            (TypeError, "`labels` integer torch.bool", lambda w, call=call: call(w, w.labels > 2)),
            (ValueError, "`labels` (6,) (2,)", lambda w, call=call: call(w, w.labels[:2])),
            *(
                [(TypeError, "`labels` integer (6,)", lambda w, call=call: call(w, w.z.softmax(dim=1)))]
                if loss is not trades_loss  # whose terms need no single class
                else [(ValueError, "`labels` probabilities sum 1", lambda w, call=call: call(w, w.z))]
            ),
            (TypeError, "`labels` Tensor list", lambda w, call=call: call(w, [0] * 6)),
            (ValueError, "`labels` meta", lambda w, call=call: call(w, w.labels.to("meta"))),
            *(
                ()
                if loss in (margin, dlr)  # called at every step of an attack, which has checked the range
                else (
                    (ValueError, "`labels` [0, 4] 5 classes", lambda w, call=call: call(w, w.labels + 4)),
                    (ValueError, "`labels` [0, 4] -100", lambda w, call=call: call(w, w.labels - 100)),
                )
            ),
        )
    ),
    *(
        (ValueError, f"{loss.__name__}: `beta` {beta}",
         lambda w, loss=loss, beta=beta: loss(w.z, w.z2, w.labels, beta=beta))
        for loss in (trades_loss, mart_loss) for beta in (-1.0, math.inf)
    ),
    (TypeError, "trades_loss: `beta` str", lambda w: trades_loss(w.z, w.z2, w.labels, beta="6")),
    # Divergences, partition, metrics
    *(
        row
        for f in (squared_error, cosine_distance, kl_divergence, js_divergence)
        for row in (
            (ValueError, f"{f.__name__}: (6, 2) (6, 5)", lambda w, f=f: f(w.z, w.z[:, :2])),
            (ValueError, f"{f.__name__}: meta cpu", lambda w, f=f: f(w.z, w.z.to("meta"))),
            (TypeError, f"{f.__name__}: floating torch.int64", lambda w, f=f: f(w.labels, w.labels)),
            (ValueError, f"{f.__name__}: batch", lambda w, f=f: f(w.z[0, 0], w.z[0, 0])),
        )
    ),
    (ValueError, "kl_divergence: `temperature` 0.0", lambda w: kl_divergence(w.z, w.z2, temperature=0.0)),
    (ValueError, "js_divergence: `temperature` nan", lambda w: js_divergence(w.z, w.z2, temperature=math.nan)),
    (ValueError, "boundary_partition: `reduced_logits` (3, 5)", lambda w: boundary_partition(w.z, w.z2[:3], w.labels)),
    (ValueError, "boundary_partition: `adv_logits` (3, 5)",
     lambda w: boundary_partition(w.z, w.z2, w.labels, adv_logits=w.z3[:3])),
    (TypeError, "boundary_partition: `clean_logits` floating",
     lambda w: boundary_partition(w.labels, w.labels, w.labels)),
    (TypeError, "accuracy: `logits` floating", lambda w: accuracy(w.labels, w.labels)),
    *(
        row
        for f in (nrr, mean_score)
        for row in (
            (ValueError, f"{f.__name__}: `clean` -1.0", lambda w, f=f: f(-1.0, 50.0)),
            (ValueError, f"{f.__name__}: `robust` nan", lambda w, f=f: f(80.0, math.nan)),
            (ValueError, f"{f.__name__}: `clean` inf", lambda w, f=f: f(math.inf, 50.0)),
            (TypeError, f"{f.__name__}: `clean` str", lambda w, f=f: f("80", 50.0)),
            (TypeError, f"{f.__name__}: `robust` NoneType", lambda w, f=f: f(80.0, None)),
        )
    ),
    # Averaging
    (TypeError, "snapshot: `model` Module function", lambda w: snapshot(lambda x: x)),
    (TypeError, "ema_update: `model` Module function", lambda w: ema_update(w.average, lambda x: x, decay=0.9)),
    (TypeError, "ema_update: NoneType", lambda w: ema_update(None, w.model, decay=0.9)),
    (ValueError, "ema_update: `decay` [0.0, 1.0] 1.1", lambda w: ema_update(w.average, w.model, decay=1.1)),
    (ValueError, "ema_update: `decay` -0.1", lambda w: ema_update(w.average, w.model, decay=-0.1)),
    (ValueError, "ema_update: `average` missing unknown", lambda w: ema_update(w.average, w.other, decay=0.9)),
    (ValueError, "ema_update: 'weight' (6, 5) (2, 2)",
     lambda w: ema_update({"weight": w.z, "bias": w.z[0]}, w.other, decay=0.9)),
    (ValueError, "call_with: weights missing", lambda w: call_with(w.model, {}, w.x)),
    (TypeError, "call_with: `model` Module", lambda w: call_with(lambda x: x, {}, w.x)),
    # Evaluation
    (TypeError, "evaluate: `model` callable NoneType", lambda w: evaluate(None, [(w.x, w.labels)], {})),
    (TypeError, "evaluate: `cascade` True or False 'no'", lambda w: evaluate(w.model, [], {}, cascade="no")),
    (TypeError, "evaluate: `attacks` list", lambda w: evaluate(w.model, [(w.x, w.labels)], [pgd])),
    (TypeError, "evaluate: attack 'pgd' NoneType", lambda w: evaluate(w.model, [(w.x, w.labels)], {"pgd": None})),
    (ValueError, "evaluate: `loader`", lambda w: evaluate(w.model, [], {}, progress=False)),
    (TypeError, "evaluate: `loader` pairs", lambda w: evaluate(w.model, [(w.x, w.labels, 1)], {}, progress=False)),
    (TypeError, "evaluate: `loader` pairs", lambda w: evaluate(w.model, (w.x, w.labels), {}, progress=False)),
    (TypeError, "evaluate: `x` torch.uint8 / 255",
     lambda w: evaluate(w.model, [(w.x.byte(), w.labels)], {}, progress=False)),
    (TypeError, "evaluate: `labels` integer torch.float32",
     lambda w: evaluate(w.model, [(w.x, w.labels.float())], {}, progress=False)),
    (ValueError, "evaluate: `labels` [0, 4]", lambda w: evaluate(w.model, [(w.x, w.labels + 9)], {}, progress=False)),
    (ValueError, "evaluate: `labels` (6,) (2,)",
     lambda w: evaluate(w.model, [(w.x, w.labels[:2])], {}, progress=False)),
    (TypeError, "evaluate: `model` tuple",
     lambda w: evaluate(lambda x: (x, x), [(w.x, w.labels)], {}, progress=False)),
    (ValueError, "evaluate: attacks 'cut' (1, 3, 2, 2)",
     lambda w: evaluate(w.model, [(w.x, w.predicted)], {"cut": lambda model, x, labels: x[:1]}, progress=False)),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "says", "call"), [pytest.param(*row, id=f"{i}: {row[1]}") for i, row in enumerate(ROWS)]
)
def test_refused_with_a_message_and_nothing_changed(error, says, call):
    world = World()
    before = world.fingerprint()
    with pytest.raises(error) as raised:
        call(world)
    after = world.fingerprint()
    pattern = ".*".join(re.escape(word) for word in says.split(" "))
    assert re.search(pattern, str(raised.value), re.DOTALL), str(raised.value)
    assert unchanged(before, after)


def test_losses_read_no_values_so_broken_numbers_pass_through():
    broken = torch.full((3, 4), math.nan)
    assert robust_perception_loss(broken, broken, broken).isnan()
    assert trades_loss(broken, broken, torch.zeros(3, dtype=torch.long)).isnan()


def test_validation_can_be_turned_off():
    world = World()
    shifted = 4 * world.x - 2
    with pytest.raises(ValueError, match=r"pgd: `x` must lie in the bounds"):
        pgd(world.model, shifted, world.labels, THREAT)
    assert pgd(world.model, shifted, world.labels, THREAT, validate=False).shape == shifted.shape


def test_inputs_a_rounding_error_outside_the_bounds_are_accepted():
    world = World()
    x = world.x.clone()
    x[0, 0, 0, 0] = 1 + 2**-23
    x_adv = pgd(world.model, x, world.labels, THREAT)
    assert x_adv.max() <= 1


def test_the_same_inputs_are_fine_in_bounds_that_hold_them():
    world = World()
    threat = Linf(0.1, bounds=(-2.1, 2.64))
    assert pgd(world.model, 4 * world.x - 2, world.labels, threat).min() >= -2.1


OPTIONS = [
    (name, option)
    for name in objectives.__all__
    if inspect.isfunction(function := getattr(objectives, name))
    for option, parameter in inspect.signature(function).parameters.items()
    if parameter.annotation is bool or isinstance(parameter.default, bool)
]


@pytest.mark.parametrize("value", ["no", 1, torch.tensor([True, False])], ids=["text", "number", "tensor"])
@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_what_is_on_or_off_is_true_or_false(name, option, value):
    w, parameters = World(), inspect.signature(getattr(objectives, name)).parameters
    needed = {one: None for one, p in parameters.items() if p.kind is p.KEYWORD_ONLY and p.default is p.empty} | (
        {"mix": 0.5} if "mix" in parameters else {}
    )
    with pytest.raises(TypeError, match=f"`{option}` must be True or False"):
        getattr(objectives, name)(w.model, (w.x, w.x), w.labels, pgd, **{**needed, option: value})


ATTACKING = [
    name for name in objectives.__all__
    if inspect.isfunction(function := getattr(objectives, name)) and "attack" in inspect.signature(function).parameters
]  # fmt: skip


def asked_for(model, w):
    """What objectives need besides the four, by name."""
    other, rows = nn.Sequential(nn.Flatten(), nn.Linear(12, 6)), torch.full((len(w.labels), 6), 1 / 6)
    return {
        "average": snapshot(model), "helper": other, "largest": 0.2, "margins": torch.full((len(w.labels),), 0.1),
        "mix": 0.5, "pairs": "attacked", "robust_teacher": other, "standard_teacher": other,
        "table": torch.full((6, 6), 1 / 6), "targets": rows, "teacher": other, "threat": THREAT,
    }  # fmt: skip


@pytest.mark.parametrize("name", ATTACKING)
def test_an_objective_refuses_an_option_before_it_attacks_and_in_its_own_name(name):
    w, calls = World(), []
    labels, model = w.labels % 3, nn.Sequential(nn.Flatten(), nn.Linear(12, 6))  # classes and their dummies, for DUCAT

    def attack(model, x, labels, loss=None, start=None):
        calls.append(labels)
        for _ in range(10):  # which GAIRAT counts
            loss is None or loss(model(x), labels)
        return x.clone()

    function = getattr(objectives, name)
    options = {
        option: parameter
        for option, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    needed = {
        option: value for option, value in asked_for(model, w).items()
        if option in options and (option == "mix" or options[option].default is inspect.Parameter.empty)
    }  # fmt: skip
    views = (w.x,) if name in ("mma", "te") else (w.x, w.x)
    loss, _ = function(model, views, labels, attack, **needed)  # fine as it is
    assert loss.ndim == 0
    for option, parameter in options.items():
        values = [object(), "no such word"]
        if isinstance(parameter.default, float):
            values.append(math.nan)
        for value in values:
            calls.clear()
            with pytest.raises((TypeError, ValueError)) as caught:
                function(model, views, labels, attack, **{**needed, option: value})
            assert re.match(f"{name}: .*`{option}`", str(caught.value))
            assert not calls


ATTACKS = ["apgd", "auto_attack", "cw", "fab", "fgsm", "friendly_pgd", "n_fgsm", "pgd", "square", "surrogate_pgd"]


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_refuses_an_option_before_it_runs_the_model_and_in_its_own_name(name):
    w, calls = World(), []

    class Counting(nn.Module):
        def forward(self, x):
            calls.append(x)
            return w.model(x)

    function = getattr(attacks, name)
    for option, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        for value in (object(), "no such word", [1]):
            with pytest.raises((TypeError, ValueError)) as caught:
                function(Counting(), w.x, w.labels, THREAT, **{option: value})
            assert re.match(f"{name}: .*`{option}`", str(caught.value)), (option, str(caught.value))
    assert not calls


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", ATTACKS)
def test_tensors_that_only_hold_data_or_have_no_one_shape_are_named(name):
    w = World()
    eight, nested = w.x.to(torch.float8_e4m3fn), torch.nested.as_nested_tensor(list(w.x), layout=torch.strided)
    for x, message in ((eight, "sixteen bits at least"), (nested, "of one shape, got a nested one")):
        with pytest.raises(TypeError, match=rf"^{name}: `x` must .*{message}"):
            getattr(attacks, name)(w.model, x, w.labels, THREAT)


@pytest.mark.parametrize("name", ["pgd", "fgsm", "cw"])
def test_a_generator_that_is_none_is_refused_where_nothing_is_drawn_too(name):
    w = World()
    for generator, error in ((7, TypeError), (SampleGenerator(0, torch.arange(2)), ValueError)):
        with pytest.raises(error, match=f"{name}: `generator`"):
            getattr(attacks, name)(w.model, w.x, w.labels, THREAT, start="clean", generator=generator)


@pytest.mark.parametrize(
    ("option", "value"), [("device", "nowhere"), ("classes", 5), ("classes", "abcde"), ("record", 3)]
)
def test_an_evaluation_refuses_where_and_what_before_it_begins(option, value):
    w, seen = World(), []

    def loader():
        seen.append(1)
        yield w.x, w.labels

    with pytest.raises(TypeError, match=f"evaluate: `{option}` must be"):
        evaluate(w.model, loader(), {"pgd": partial(pgd, threat=THREAT)}, **{option: value})
    assert not seen


@pytest.mark.parametrize("name", ["raat", "raat_plus_plus", "raat_sharp"])
def test_reductions_belong_to_images_or_to_rows_that_are_attacked_together(name):
    w, needed = World(), {"mix": 0.5} | ({"average": None} if name == "raat_sharp" else {})
    function, images = getattr(objectives, name), len(w.x)
    for rows in (images // 2, images + 1, *([2 * images] if name == "raat_sharp" else [])):
        with pytest.raises(ValueError, match=f"{name}: `eta` must be one floating-point number for each"):
            function(w.model, (w.x, w.x), w.labels, lambda *_, **__: w.x, eta=torch.full((rows,), 0.5), **needed)
    function(w.model, (w.x, w.x), w.labels, partial(pgd, threat=THREAT), eta=torch.full((images,), 0.5), **needed)


def test_a_model_on_another_device_than_its_inputs_is_named():
    w, model = World(), nn.Sequential(nn.Flatten(), nn.Linear(12, 5, device="meta"))
    for name, call in {
        "pgd": lambda: pgd(model, w.x, w.labels, THREAT),
        "square": lambda: square(model, w.x, w.labels, THREAT),
        "evaluate": lambda: evaluate(model, [(w.x, w.labels)], {}, progress=False),
        "sanity_checks": lambda: sanity_checks(model, w.x, w.labels, THREAT),
        "standard": lambda: objectives.standard(model, (w.x,), w.labels, None),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name}: `.*` is on cpu but the model has weights on meta: "):
            call()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("net", [nn.Linear(12, 5), nn.Conv1d(1, 5, 12)], ids=["linear", "convolution"])
def test_a_model_of_another_dtype_than_its_inputs_is_named(net, dtype):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x.flatten(1)[:, None]).flatten(1)

    w = World()
    for function in (fgsm, pgd, apgd, square):
        with pytest.raises(ValueError, match=rf"`x` is {dtype} but the model has weights of torch.float32"):
            function(Model(), w.x.to(dtype), w.labels, Linf(0.05))


def test_so_it_is_wherever_else_a_model_is_asked():
    w = World()
    model, batch, attack = w.model.double(), (w.x, w.labels), partial(pgd, threat=THREAT)
    for name, call in {
        "evaluate": lambda: evaluate(model, [batch], {}, progress=False),
        "sanity_checks": lambda: sanity_checks(model, *batch, THREAT),
        "still_adversarial": lambda: still_adversarial(model, *batch),
        "perception_gap": lambda: diagnostics.perception_gap(model, [batch], lambda f, x, labels: x + 0.1),
        "perception_path": lambda: diagnostics.perception_path(model, w.x, w.x + 0.1, [0.5]),
        "attacked_by_group": lambda: diagnostics.attacked_by_group(model, *batch, lambda *_: w.x, boundary="clean"),
        "standard": lambda: objectives.standard(model, (w.x,), w.labels, None),
        "trades": lambda: objectives.trades(model, (w.x,), w.labels, attack),
        "rpat": lambda: objectives.rpat(model, (w.x,), w.labels, attack, base="trades"),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name}: `.*` is torch.float32 but the model has weights of .*float64"):
            call()


def test_a_batch_of_one_that_batch_norm_cannot_take_is_named():
    w = World()
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Linear(4, 5))
    attack = partial(pgd, threat=THREAT)
    for rows, calls in {
        1: {
            **{f.__name__: partial(f, model_mode="as_is") for f in (pgd, fgsm, apgd, square, attacks.n_fgsm)},
            "standard": lambda m, x, y, _: objectives.standard(m, (x,), y, None),
            "trades": lambda m, x, y, _: objectives.trades(m, (x,), y, attack),
            "raat_sharp": lambda m, x, y, _: objectives.raat_sharp(m, (x, x), y, attack, average=snapshot(m), mix=0.5),
            "rpat": lambda m, x, y, _: objectives.rpat(m, (x,), y, attack, base="mart"),
        },
        2: {"apgd": partial(apgd, model_mode="as_is")},  # one is broken, one is left
    }.items():
        x, labels = w.x[:rows], torch.arange(rows)
        if rows == 2:
            model[3].bias.data[:] = torch.tensor([1e4, 0, -1e4, -1e4, -1e4])
        for name, call in calls.items():
            with pytest.raises(ValueError, match=rf"^{name}: a batch norm in train mode sees .* \(1, .*drop_last"):
                call(model, x, labels, THREAT)


@pytest.mark.parametrize("name", ["segment_residual", "norm_defect", "directional_second_derivative", "peano_identity"])
def test_what_theory_looks_at_is_a_function_at_places(name):
    x, function = torch.rand(2, 3), getattr(theory, name)
    with pytest.raises(TypeError, match=f"{name}: `h` must be a module or a function"):
        function(None, x, x, 0.5)
    with pytest.raises(TypeError, match=f"{name}: `alphas` must be a number or a sequence"):
        function(torch.exp, x, x, None)
