"""Attacks as other libraries run them: each a function of no arguments, or the reason why not."""

import importlib
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from cases import STEP_SIZE, STEPS, THREAT
from torch import Tensor, nn

Attack = Callable[[], Tensor]
MISSING = "not installed"


class Budget(NamedTuple):
    """What PGD may do: a ball of the largest norm, in so many steps of this size."""

    eps: float = THREAT.eps
    steps: int = STEPS
    step_size: float = STEP_SIZE


USUAL = Budget()


def peers(model: nn.Module, x: Tensor, labels: Tensor, budget: Budget = USUAL) -> dict[str, Attack | str]:
    """PGD from the clean inputs by the name of the library; the text says that one is not installed."""
    prepare = {"torchattacks": torchattacks, "foolbox": foolbox, "adv-lib": adv_lib, "art": art}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say while they load is theirs
        return {name: prepared(make, model, x, labels, budget) for name, make in prepare.items()}


def strongest(model: nn.Module, x: Tensor, labels: Tensor, eps: float, *, steps: int = 100) -> dict[str, Attack | str]:
    """The strongest attacks of other libraries in a ball of the largest norm, by their names."""
    prepare = {
        "torchattacks AutoAttack": torchattacks_auto_attack, "adv-lib APGD": adv_lib_apgd,
        "adv-lib APGD-T": adv_lib_apgd_targeted,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: prepared(make, model, x, labels, eps, steps) for name, make in prepare.items()}


def prepared(make: Callable[..., Attack], *arguments: object) -> Attack | str:
    """The attack, if its library is there."""
    try:
        return make(*arguments)
    except ImportError:
        return MISSING


def torchattacks(model: nn.Module, x: Tensor, labels: Tensor, budget: Budget) -> Attack:
    library = importlib.import_module("torchattacks")
    attack = library.PGD(model, eps=budget.eps, alpha=budget.step_size, steps=budget.steps, random_start=False)
    return lambda: attack(x, labels)


def foolbox(model: nn.Module, x: Tensor, labels: Tensor, budget: Budget) -> Attack:
    """Without its check of the result, one forward pass, which the others do not make."""
    library = importlib.import_module("foolbox")
    attack = library.attacks.LinfPGD(abs_stepsize=budget.step_size, steps=budget.steps, random_start=False)
    wrapped = library.PyTorchModel(model, bounds=(0, 1), device=x.device)
    return lambda: attack.run(wrapped, x, library.criteria.Misclassification(labels), epsilon=budget.eps)


def adv_lib(model: nn.Module, x: Tensor, labels: Tensor, budget: Budget) -> Attack:
    library = importlib.import_module("adv_lib.attacks")
    options = {"random_init": False, "absolute_step_size": budget.step_size, "steps": budget.steps}
    return lambda: library.pgd_linf(model, x, labels, budget.eps, **options)


def art(model: nn.Module, x: Tensor, labels: Tensor, budget: Budget) -> Attack:
    """It takes and gives arrays on the host."""
    evasion = importlib.import_module("art.attacks.evasion")
    estimators = importlib.import_module("art.estimators.classification")
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    estimator = estimators.PyTorchClassifier(
        model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), classes, clip_values=(0.0, 1.0),
        device_type="gpu" if x.is_cuda else "cpu",
    )  # fmt: skip
    attack = evasion.ProjectedGradientDescentPyTorch(
        estimator, eps=budget.eps, eps_step=budget.step_size, max_iter=budget.steps, batch_size=len(x), verbose=False
    )
    images, targets = x.cpu().numpy(), labels.cpu().numpy()
    return lambda: torch.from_numpy(attack.generate(images, targets))


def torchattacks_auto_attack(model: nn.Module, x: Tensor, labels: Tensor, eps: float, _: int) -> Attack:
    """Its standard version, whose steps cannot be chosen; seeded with 0."""
    library = importlib.import_module("torchattacks")
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    attack = library.AutoAttack(model, norm="Linf", eps=eps, version="standard", n_classes=classes, seed=0)
    return lambda: attack(x, labels)


def adv_lib_apgd(model: nn.Module, x: Tensor, labels: Tensor, eps: float, steps: int) -> Attack:
    library = importlib.import_module("adv_lib.attacks")
    return lambda: library.apgd(model, x, labels, eps, norm=float("inf"), n_iter=steps, loss_function="ce")


def adv_lib_apgd_targeted(model: nn.Module, x: Tensor, labels: Tensor, eps: float, steps: int) -> Attack:
    library = importlib.import_module("adv_lib.attacks")
    return lambda: library.apgd_targeted(model, x, labels, eps, norm=float("inf"), n_iter=steps)
