"""The methods of `methods_on_digits.py`: one line each."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perceptual_at import (
    adaptive_eta,
    attacks,
    draw_beta,
    ema_update,
    friendly_pgd,
    frozen,
    interpolate,
    memories,
    n_fgsm,
    objectives,
    pgd,
    smooth_labels,
    snapshot,
)
from perceptual_at.class_predictions import class_table
from perceptual_at.divergences import cross_entropy
from perceptual_at.models import DigitsCNN
from perceptual_at.objectives.cure import cure_gradients
from perceptual_at.schedules import piat_decay

ETAS = (0.1, 0.25, 0.5, 0.75)


@dataclasses.dataclass(frozen=True)
class Method:
    """How a method's step differs from that of PGD-AT."""

    title: str
    loss: Callable[..., Tensor]
    """`(run, views, labels, attack) -> loss`."""
    against: str = "pgd_at"
    """What its scores are compared with."""
    two_views: bool = False
    attack: Callable[[Any], Callable[..., Tensor]] = lambda run: run.attack()
    perturbation: float = 0.0
    """Size of the weight perturbation (AWP)."""
    attacks: int = 1
    decay: float = 0.98
    average_from: float = 0.5
    evaluates_average: bool = False
    swa: bool = False
    dummies: bool = False
    """Two outputs per class (DUCAT), folded for the evaluation."""
    cosines: float = 0.0
    """Scale of a last layer on the hypersphere."""
    prepare: Callable[[Any], None] | None = None
    after: Callable[[Any], None] | None = None
    step: Callable[..., None] | None = None
    """A whole step, where it is not one loss and one backward pass."""


def draw(generator: torch.Generator) -> float:
    return draw_beta(fold="max", generator=generator)


def by(objective: str, **options: Any) -> Callable[..., Tensor]:
    """The loss of an objective; options that are functions are asked about the run in every step."""

    def loss(run: Any, views: Any, labels: Tensor, attack: Any) -> Tensor:
        chosen = {name: value(run) if callable(value) else value for name, value in options.items()}
        return getattr(objectives, objective)(run.model, views, labels, attack, **chosen)[0]

    return loss


def mixed(run: Any) -> float:
    return run.mix()


def on(base: str, **options: Any) -> Callable[[Any], Any]:
    """A base with both terms in it: DICAR, to be given to RPAT."""
    return lambda run: functools.partial(objectives.dicar, base=base, mix=run.mix(), **options)


def late(value: Any, start: float = 0.5) -> Callable[[Any], Any]:
    """None until a share of the budget is spent."""
    return lambda run: value(run) if run.progress >= start else None


def smoothed(run: Any, views: Any, labels: Tensor, attack: Any) -> Tensor:
    x_adv = attack(run.model, views[0], labels)
    return cross_entropy(run.model(x_adv), smooth_labels(labels, 10, smoothing=0.2, over="others")).mean()


def adaptive(run: Any, views: Any, labels: Tensor, attack: Any, *, objective: str = "raat") -> Tensor:
    """RAAT with a reduction for each sample."""
    x, twice = torch.cat(views), labels.repeat(2)
    x_adv = attack(run.model, x, twice)
    with torch.no_grad(), frozen(run.model) as f:
        path = torch.stack([f(interpolate(x, x_adv, eta)) for eta in ETAS])
    eta = adaptive_eta(path, twice, etas=ETAS)
    answer = lambda *_, **__: x_adv  # noqa: E731
    return getattr(objectives, objective)(run.model, views, labels, answer, eta=eta, mix=run.mix())[0]


def second_network(run: Any) -> None:
    run.held["teacher"] = DigitsCNN(width=run.settings["width"]).train()
    run.held["trained"] = [run.held["teacher"]]


def even_table(run: Any) -> None:
    run.held |= {"table": torch.full((10, 10), 0.1), "sums": torch.zeros(10, 10)}


def new_table(run: Any) -> None:
    if epoch_ends(run):
        run.held["table"] = class_table(run.held["sums"], run.held["table"])
        run.held["sums"] = torch.zeros(10, 10)


def ensemble(run: Any) -> None:
    run.held["ensemble"] = torch.zeros(run.images, 10)


def temporal(run: Any, views: Any, labels: Tensor, attack: Any, **options: Any) -> Tensor:
    targets = None
    if run.progress >= 0.5:
        with torch.no_grad(), frozen(run.model) as f:
            run.held["ensemble"] = memories.ensemble_update(run.held["ensemble"], run.index, f(views[0]))
        targets = memories.ensemble_targets(run.held["ensemble"], run.index)
    weight = 30.0 * min(1.0, max(0.0, run.progress - 0.5) / 0.3)
    return objectives.te(run.model, views, labels, attack, targets=targets, weight=weight, **options)[0]


def first_margins(run: Any) -> None:
    run.held["margins"] = torch.zeros(run.images)


def max_margin(run: Any, views: Any, labels: Tensor, attack: Any) -> Tensor:  # noqa: ARG001
    clean = run.model(views[0])
    search = functools.partial(pgd, steps=run.settings["steps"], generator=run.generator, validate=False)
    found = attacks.find_margins(
        run.model, views[0], clean, labels, search, ball=type(run.threat), before=run.held["margins"][run.index],
        largest=1.05 * run.settings["eps"], search_steps=5,
    )  # fmt: skip
    run.held["margins"] = memories.write(run.held["margins"], run.index, found.margins)
    answer = lambda *_, **__: found.x_adv  # noqa: E731
    return objectives.mma(
        run.model, views, labels, answer, margins=found.margins, largest=run.settings["eps"], clean_logits=clean
    )[0]


def kept_perturbation(run: Any) -> None:
    run.held["delta"] = torch.zeros(run.settings["batch"], 1, 8, 8)


def free(run: Any, optimizer: torch.optim.Optimizer, views: Any, labels: Tensor, *, replays: int = 4) -> None:
    """Free-AT: one gradient moves weights and perturbation, several times per batch."""
    (x,) = views
    for _ in range(replays):
        x_adv = run.threat.project(x + run.held["delta"], x).requires_grad_()
        optimizer.zero_grad()
        cross_entropy(run.model(x_adv), labels).mean().backward()
        optimizer.step()
        moved = x_adv.detach() + run.threat.eps * run.threat.steepest(x_adv.grad)
        run.held["delta"] = run.threat.project(moved, x) - x
        run.spent += 1  # the input gradient; weights and forward pass were counted


def epoch_of(run: Any) -> int:
    return run.steps // (run.images // run.settings["batch"])


def epoch_ends(run: Any) -> bool:
    return run.steps % (run.images // run.settings["batch"]) == 0


def own_average(run: Any) -> None:
    run.held["average"] = snapshot(run.model)


def back_to_the_start(run: Any) -> None:
    """PIAT: at the end of an epoch, some of the way back to its first weights."""
    if epoch_ends(run):
        run.model.load_state_dict(ema_update(run.held["average"], run.model, decay=piat_decay(epoch_of(run) - 1)))
        run.held["average"] = snapshot(run.model)


def revised(run: Any, optimizer: torch.optim.Optimizer, views: Any, labels: Tensor) -> None:
    """CURE: a step along the revised gradient, and now and then one of the average."""
    optimizer.zero_grad()
    average = run.held["average"]
    cure_gradients(run.model, views, labels, run.attack(), average=average, generator=run.generator)
    run.spent += 6  # two backward passes more: of the clean loss, and of the KL of two inputs
    optimizer.step()
    if torch.rand((), generator=run.generator) < 0.2:
        decay = min(1 - 1 / (run.steps + 1), 0.999)
        run.held["average"] = ema_update(average, run.model, decay=decay, buffers="keep")


def single(**changes: Any) -> Callable[[Any], Any]:
    return lambda run: run.attack(steps=1, step_size=1.25 * run.settings["eps"], **changes)


def noisy(run: Any) -> Any:
    return functools.partial(n_fgsm, threat=run.threat, generator=run.generator, validate=False)


def friendly(run: Any) -> Any:
    patience = int(2 * run.progress)
    return functools.partial(
        friendly_pgd, threat=run.threat, steps=run.settings["steps"], patience=patience, generator=run.generator,
        validate=False,
    )  # fmt: skip


def average(run: Any) -> Any:
    return run.average


def teacher(name: str) -> Callable[[Any], Any]:
    return lambda run: run.teachers[name]


def generator(run: Any) -> torch.Generator:
    return run.generator


METHODS = {
    "standard": Method("standard training", by("standard")),
    "pgd_at": Method("PGD-AT", by("pgd_at")),
    "trades": Method("TRADES", by("trades", generator=generator)),
    "mart": Method("MART", by("mart", generator=generator)),
    "consistency_at": Method("Consistency-AT", by("consistency_at"), two_views=True),
    "wa": Method("PGD-AT, EMA", by("pgd_at"), evaluates_average=True),
    "swa": Method("PGD-AT, SWA", by("pgd_at"), swa=True),
    "awp": Method("PGD-AT, AWP", by("pgd_at"), perturbation=0.01),
    "awp_wa": Method("PGD-AT, AWP, EMA", by("pgd_at"), perturbation=0.01, evaluates_average=True),
    "rebat": Method("ReBAT", by("rebat", average=late(average)), evaluates_average=True, against="wa"),
    # RPAT, RAAT, and both
    "rpat": Method("RPAT", by("rpat")),
    "rpat_quotient": Method("RPAT, Eq. 3", by("rpat", form="quotient")),
    "rpat_relative": Method("RPAT, relative form (ours)", by("rpat", form="relative"), against="rpat"),
    "rpat_trades": Method("RPAT on TRADES", by("rpat", base="trades", generator=generator), against="trades"),
    "rpat_mart": Method("RPAT on MART", by("rpat", base="mart", generator=generator), against="mart"),
    "rpat_plus_plus": Method(
        "RPAT++", by("rpat_plus_plus", average=late(average)), evaluates_average=True, against="wa"
    ),
    "dicar": Method("DICAR", by("dicar", mix=mixed), two_views=True),
    "dicar_trades": Method(
        "DICAR on TRADES", by("dicar", base="trades", mix=mixed, generator=generator), two_views=True, against="trades"
    ),
    "raat": Method("RAAT", by("raat", mix=mixed), two_views=True),
    "raat_adaptive": Method("RAAT, adaptive eta (ours)", adaptive, two_views=True, against="raat"),
    "raat_plus_plus": Method("RAAT++", by("raat_plus_plus", mix=mixed, generator=generator), two_views=True),
    "raat_sharp": Method(
        "RAAT#",
        by("raat_sharp", mix=mixed, average=average, weight=lambda run: float(run.progress >= 0.5)),
        two_views=True,
        evaluates_average=True,
        against="wa",
        attacks=2,
    ),
    "rpat_raat": Method("RPAT and RAAT (ours)", by("rpat_raat", mix=mixed), two_views=True, against="raat"),
    "both_trades": Method("RPAT and DICAR on TRADES", by("rpat", base=on("trades")), two_views=True, against="trades"),
    "rpat_awp": Method("RPAT, AWP", by("rpat"), perturbation=0.01, against="awp"),
    "raat_awp_wa": Method(
        "RAAT, AWP, EMA",
        by("raat", mix=mixed),
        two_views=True,
        perturbation=0.01,
        evaluates_average=True,
        against="awp_wa",
    ),
    # one step, or few
    "fgsm_rs": Method("FGSM-RS", by("pgd_at"), attack=single()),
    "n_fgsm": Method("N-FGSM", by("pgd_at"), attack=noisy),
    "grad_align": Method(
        "GradAlign", by("grad_align", threat=lambda run: run.threat, generator=generator), attack=single(start="clean")
    ),
    "free_at": Method("Free-AT", by("pgd_at"), prepare=kept_perturbation, step=free),
    "fat": Method("FAT", by("pgd_at"), attack=friendly),
    # other losses
    "score": Method("SCORE", by("score", generator=generator), against="trades"),
    "dkl": Method(
        "DKL", by("ikl", table=None, detach_adv=True, alpha=6.0, beta=6.0, generator=generator), against="trades"
    ),
    "ikl": Method(
        "IKL",
        by("ikl", table=lambda run: run.held["table"], sums=lambda run: run.held["sums"], generator=generator),
        prepare=even_table,
        after=new_table,
        against="trades",
    ),
    "lbgat": Method(
        "LBGAT",
        by("lbgat", teacher=lambda run: run.held["teacher"], generator=generator),
        prepare=second_network,
        against="trades",
    ),
    "alp": Method("ALP", by("alp")),
    "clp_attacked": Method("CLP (MART's Table 1)", by("clp", pairs="attacked")),
    "clp_images": Method("CLP (Kannan), no attack", by("clp", pairs="images", noise=0.1, generator=generator)),
    "hypersphere": Method("HE", by("hypersphere", scale=10.0, generator=generator), cosines=10.0),
    "label_smoothing": Method("label smoothing 0.2", smoothed),
    # the other methods of the papers' tables
    "gairat": Method("GAIRAT", by("gairat", steps=lambda run: run.settings["steps"])),
    "mail": Method("MAIL", by("mail", weighted=lambda run: run.progress >= 0.5, generator=generator)),
    "ewat": Method("EWAT (unverified)", by("ewat")),
    "sovr": Method("SOVR (unverified)", by("sovr")),
    "piat": Method("PIAT (unverified)", by("piat"), prepare=own_average, after=back_to_the_start),
    "ducat": Method("DUCAT", by("ducat", dummies=lambda run: run.progress >= 0.5), dummies=True),
    "te": Method("TE", temporal, prepare=ensemble),
    "te_trades": Method("TE on TRADES", functools.partial(temporal, base="trades"), prepare=ensemble, against="trades"),
    "hat": Method("HAT", by("hat", helper=teacher("standard"), generator=generator), against="trades"),
    "kd": Method("KD+SWA", by("kd", standard_teacher=teacher("standard"), robust_teacher=teacher("pgd_at")), swa=True),
    "adr": Method("ADR", by("adr", average=average), average_from=0.0, evaluates_average=True, against="wa"),
    "adr_trades": Method(
        "ADR on TRADES",
        by("adr", average=average, base="trades", generator=generator),
        average_from=0.0,
        evaluates_average=True,
        against="trades",
    ),
    "cure": Method("CURE", by("cure", average=None), prepare=own_average, step=revised, against="trades"),
    "mma": Method("MMA", max_margin, prepare=first_margins),
}
"""Every method by the name of its recipe or objective."""
