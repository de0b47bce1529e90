"""Methods of the field that the papers' tables do not print, and combinations of our own."""

from pathlib import Path
from typing import Any

from perceptual_at.commands.options.recipes.recipe import PLAIN, Recipe, recipe
from perceptual_at.commands.options.settings import Settings

_FLOOR: dict[str, Any] = {"eps": 0.031, "step_size": 0.007}
# FGSM-RS and GradAlign: one step of 1.25 budgets, attacked in train mode, the rate up and down in straight lines.
_SINGLE = Settings().changed(
    model="preact_resnet18", steps=1, step_size=10 / 255, model_mode="as_is", schedule="triangular", lr=0.2, epochs=15,
)  # fmt: skip
# SCORE without generated images, and the other codes of 110 epochs on this network.
_PREACT = Settings().changed(model="preact_resnet18", lr=0.05)
# FAT's code: its WideResNet-32-10 is not among ours; the last drop, to 0.005 of the rate, is 0.001 here.
_FAT = Settings().changed(
    model="wide_resnet34_10", attack="friendly", weight_decay=2e-4, epochs=120, milestones=(60, 90, 110), **_FLOOR,
)  # fmt: skip
# IKL's code: five steps of half a budget that grows over all epochs, and weights perturbed from epoch 10 on.
_IKL = Settings().changed(
    model="wide_resnet34_10", objective="ikl", lr=0.2, schedule="cosine", epochs=200, steps=5, step_size=4 / 255,
    eps_ramp=200, awp=0.005, awp_start=10,
)  # fmt: skip
_LBGAT = Settings().changed(
    model="wide_resnet34_10", second="resnet18", objective="lbgat", weight_decay=2e-4, epochs=100, milestones=(75, 90),
    data="cifar100", **_FLOOR,
)  # fmt: skip
# Training with generated images: they are given as `generated.npz` or by --extra. Its code also leaves batch norm's
# scales out of the weight decay of networks that name them so, and cycles the momentum, which nothing here does.
_GENERATED = Settings().changed(
    model="wide_resnet28_10", extra=Path("generated.npz"), extra_share=0.7, batch=512, lr=0.2, epochs=400,
    schedule="warm_cosine", nesterov=True, average_decay=0.995, averaging="ramp", average_start=10, held_out=1024,
)  # fmt: skip

RECIPES: dict[str, Recipe] = {
    "fgsm_rs": recipe("FGSM-RS", _SINGLE),
    "n_fgsm": recipe("N-FGSM, noise beyond the ball", _SINGLE, attack="n_fgsm", epochs=30),
    "grad_align": recipe(
        "GradAlign", _SINGLE.changed(start="clean"), objective="grad_align", lr=0.3, peak_at=0.4, epochs=30, weight=0.2
    ),
    # Eight steps on each batch; the perturbation moves by a whole budget.
    "free_at": recipe(
        "Free-AT", _SINGLE, attack="free", replays=8, step_size=8 / 255, model_mode="eval", lr=0.04, epochs=10
    ),
    "fat": recipe("FAT on PGD-AT", _FAT, patience=(50, 90), attack_noise=0.001),
    "fat_trades": recipe(
        "FAT on TRADES", _FAT, objective="trades", patience=(30, 50, 70), epochs=85, milestones=(60, 75)
    ),
    "fat_mart": recipe(
        "FAT on MART", _FAT, objective="mart", patience=(20, 40, 60, 80), epochs=90, milestones=(60, 75)
    ),
    "label_smoothing": recipe("PGD-AT, labels smoothed by 0.2", _PREACT, lr=0.1, model_mode="as_is", smoothing=0.2),
    "score": recipe(
        "SCORE (TRADES-LSE)", _PREACT, objective="score", beta=6.0, options=("slack=0.1", "adv_first=True")
    ),
    "score_pgd": recipe("SCORE (PGD-LSE)", _PREACT, objective="score", base="pgd_at", options=("slack=0.17778",)),
    "generated": recipe(
        "TRADES with generated images", _GENERATED, objective="trades", beta=5.0, smoothing=0.1, smoothing_over="all"
    ),
    "generated_score": recipe("SCORE with generated images", _GENERATED, objective="score", beta=4.0),
    "dkl": recipe("DKL", objective="ikl", beta=6.0, options=("table=None", "detach_adv=True", "alpha=6.0")),
    "ikl": recipe("IKL", _IKL, beta=20.0, options=("alpha=4.0",)),
    "gkl": recipe("GKL", _IKL, beta=20.0, options=("alpha=4.0", "gamma=0.2", "temperature=1.0")),
    "lbgat": recipe("LBGAT0, a network trained along on clean images", _LBGAT, beta=0.0),
    "lbgat6": recipe("LBGAT6, a network trained along on clean images", _LBGAT, beta=6.0),
    "alp": recipe("ALP, as in HE's code", objective="alp", weight=0.5),
    "alp_kannan": recipe(
        "ALP, as in Kannan's code", objective="alp", weight=0.5, attack="least_likely", eps=16 / 255,
        average_decay=0.9999, options=("joint=True", "smoothing=0.1"),
    ),
    "alp_mart": recipe(
        "ALP, as in MART's Table 1", objective="alp", options=("supervise=adversarial", "space=probabilities")
    ),
    "clp_attacked": recipe("CLP, as in MART's Table 1", objective="clp", options=("pairs=attacked",)),
    "clp_images": recipe("CLP, as Kannan's, without an attack", objective="clp", options=("pairs=images",)),
    "hypersphere": recipe("HE on PGD-AT", PLAIN, objective="hypersphere", cosines=10.0, **_FLOOR),
    "hypersphere_trades": recipe(
        "HE on TRADES", PLAIN, objective="hypersphere", base="trades", cosines=15.0, beta=6.0, **_FLOOR
    ),
    "rpat_raat": recipe("RPAT and RAAT (our own)", PLAIN, objective="rpat_raat"),
    "rpat_dicar_trades": recipe("RPAT and DICAR on TRADES (our own)", PLAIN, objective="rpat", base="dicar+trades"),
}  # fmt: skip
