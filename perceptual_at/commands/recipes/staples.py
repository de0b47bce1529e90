"""Methods of the field that the papers' tables do not print, and combinations of our own.

What needs more than the command line holds has no recipe: a second network (LBGAT), a table of class predictions
(IKL), a network with cosines (HE), an attack of its own (N-FGSM, FAT) or a loop of its own (Free-AT).
"""

from perceptual_at.commands.recipes.recipe import PLAIN, Recipe, recipe
from perceptual_at.commands.settings import Settings

# FGSM-RS and GradAlign: one step of 1.25 budgets, attacked in train mode, the rate up and down in straight lines.
_SINGLE = Settings().changed(
    model="preact_resnet18", steps=1, step_size=10 / 255, model_mode="as_is", schedule="triangular", lr=0.2, epochs=15,
)  # fmt: skip
# SCORE without generated images, and the other codes of 110 epochs on this network.
_PREACT = Settings().changed(model="preact_resnet18", lr=0.05)

RECIPES: dict[str, Recipe] = {
    "fgsm_rs": recipe("FGSM-RS", _SINGLE),
    "grad_align": recipe(
        "GradAlign", _SINGLE.changed(start="clean"), objective="grad_align", lr=0.3, epochs=30, weight=0.2
    ),
    "score": recipe(
        "SCORE (TRADES-LSE)", _PREACT, objective="score", beta=6.0, options=("slack=0.1", "adv_first=True")
    ),
    "score_pgd": recipe("SCORE (PGD-LSE)", _PREACT, objective="score", options=("base=pgd_at", "slack=0.17778")),
    "dkl": recipe("DKL", objective="ikl", beta=6.0, options=("table=None", "detach_adv=True", "alpha=6.0")),
    "alp": recipe("ALP, as in HE's code", objective="alp", weight=0.5),
    "clp_attacked": recipe("CLP, as in MART's Table 1", objective="clp", options=("pairs=attacked",)),
    "rpat_raat": recipe("RPAT and RAAT (our own)", PLAIN, objective="rpat_raat"),
    "rpat_relative": recipe("RPAT, relative form (our own)", PLAIN, objective="rpat", options=("form=relative",)),
}
