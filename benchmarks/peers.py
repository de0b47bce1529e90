"""PGD as other libraries run it, from the same start: each a function of no arguments, or the reason why not."""

import importlib
import warnings
from collections.abc import Callable

import torch
from cases import STEP_SIZE, STEPS, THREAT
from torch import Tensor, nn

Attack = Callable[[], Tensor]
MISSING = "not installed"


def peers(model: nn.Module, x: Tensor, labels: Tensor, *, steps: int = STEPS) -> dict[str, Attack | str]:
    """The attacks by the name of their library; the text says that one is not installed."""
    prepare = {"torchattacks": torchattacks, "foolbox": foolbox, "adv-lib": adv_lib, "art": art}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say while they load is theirs
        return {name: prepared(make, model, x, labels, steps) for name, make in prepare.items()}


def prepared(make: Callable[..., Attack], *arguments: object) -> Attack | str:
    """The attack, if its library is there."""
    try:
        return make(*arguments)
    except ImportError:
        return MISSING


def torchattacks(model: nn.Module, x: Tensor, labels: Tensor, steps: int) -> Attack:
    library = importlib.import_module("torchattacks")
    attack = library.PGD(model, eps=THREAT.eps, alpha=STEP_SIZE, steps=steps, random_start=False)
    return lambda: attack(x, labels)


def foolbox(model: nn.Module, x: Tensor, labels: Tensor, steps: int) -> Attack:
    """Without its check of the result, one forward pass, which the others do not make."""
    library = importlib.import_module("foolbox")
    attack = library.attacks.LinfPGD(abs_stepsize=STEP_SIZE, steps=steps, random_start=False)
    wrapped = library.PyTorchModel(model, bounds=(0, 1), device=x.device)
    return lambda: attack.run(wrapped, x, library.criteria.Misclassification(labels), epsilon=THREAT.eps)


def adv_lib(model: nn.Module, x: Tensor, labels: Tensor, steps: int) -> Attack:
    library = importlib.import_module("adv_lib.attacks")
    options = {"random_init": False, "absolute_step_size": STEP_SIZE}
    return lambda: library.pgd_linf(model, x, labels, THREAT.eps, steps=steps, **options)


def art(model: nn.Module, x: Tensor, labels: Tensor, steps: int) -> Attack:
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
        estimator, eps=THREAT.eps, eps_step=STEP_SIZE, max_iter=steps, batch_size=len(x), verbose=False
    )
    images, targets = x.cpu().numpy(), labels.cpu().numpy()
    return lambda: torch.from_numpy(attack.generate(images, targets))
