"""What an option means is said where it is read, and in one wording wherever it means the same."""

import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import perceptual_at
from perceptual_at import objectives

# Where an option is explained, who repeats it in the same words, and which options mean something else there.
FAMILIES = [
    ("pgd", ["fgsm", "cw"], set()),
    ("pgd", ["n_fgsm", "friendly_pgd"], {"generator"}),
    ("apgd", ["fab", "square"], {"restarts", "target_classes", "early_stop", "generator"}),
    ("raat", ["raat_plus_plus", "raat_sharp", "dicar", "rpat_raat"], set()),
    ("dicar_loss", ["raat", "raat_plus_plus", "raat_sharp", "dicar"], {"mix", "mask", "average_over"}),
    ("rpat", ["rpat_raat"], set()),
    ("robust_perception_loss", ["rpat", "rpat_raat"], {"alpha"}),
    ("rebat", ["rpat_plus_plus"], set()),
    ("cure", ["cure_gradients"], set()),
    ("revise", ["cure_gradients"], set()),
    ("geometric_weights", ["gairat"], {"kappa"}),
    ("margin_weights", ["mail"], set()),
    ("entropy_weights", ["ewat"], set()),
    ("distillation_loss", ["kd"], set()),
    ("weighted_mse_loss", ["ikl"], set()),
    ("logit_pairing_loss", ["alp"], set()),
    ("TensorImages", ["image_folder", "tiny_imagenet", "npz_images", "cifar10", "cifar100"], set()),
    ("ImageFiles", ["stream_folder", "stream_tars"], set()),
    ("stream_folder", ["stream_tars"], {"root", "split"}),
    ("shift_linf", ["shift_l2", "shift_l1"], set()),
]
OWN = {"model", "x", "views", "labels", "attack", "threat", "weight", "beta", "steps", "loss", "classes"}  # everywhere


def documented():
    """Every function and class of the package with a section on its arguments, by name."""
    found = {}
    for module in pkgutil.walk_packages(perceptual_at.__path__, "perceptual_at."):
        if ".commands" in module.name or "__main__" in module.name:
            continue
        for name, value in vars(__import__(module.name, fromlist=["_"])).items():
            doc = inspect.getdoc(value) if inspect.isfunction(value) or inspect.isclass(value) else None
            if doc and value.__module__ == module.name and "\nArgs:\n" in doc:
                found[name] = arguments(doc)
    return found


def arguments(doc):
    """What a docstring says of each argument, in one line."""
    section = re.search(r"\nArgs:\n((?:    .*\n|\n)+)", doc + "\n")[1]
    parts = re.split(r"^    (\*{0,2}\w+): ", section, flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def first_sentence(text):
    return re.split(r"(?<=[\w`$)])[.;:] ", text.rstrip("."))[0]


DOCUMENTED = documented()


@pytest.mark.parametrize("path", sorted(Path(perceptual_at.__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_no_escape_became_a_control_character(path):
    assert not re.search(r"[^\n\x20-\x7e\u00a0-\U0010ffff]", path.read_text(encoding="utf-8"))


def test_no_option_is_described_elsewhere():
    elsewhere = [
        (name, option) for name, said in DOCUMENTED.items() for option, text in said.items()
        if re.match(r"(?:as in|as for|see) `", text)
    ]  # fmt: skip
    assert elsewhere == []


@pytest.mark.parametrize(
    ("source", "name", "own"), [(source, name, own) for source, names, own in FAMILIES for name in names]
)
def test_what_means_the_same_is_said_alike(source, name, own):
    said, there = DOCUMENTED[name], DOCUMENTED[source]
    shared = (said.keys() & there.keys()) - OWN - own
    assert shared
    for option in shared:
        assert said[option].startswith(first_sentence(there[option])), (option, said[option])


def test_every_option_of_an_objective_is_described():
    for name in objectives.__all__:
        function = getattr(objectives, name)
        if not inspect.isfunction(function) or name not in DOCUMENTED:
            continue
        options = {
            ("**" if p.kind is p.VAR_KEYWORD else "") + key for key, p in inspect.signature(function).parameters.items()
        }
        assert options == DOCUMENTED[name].keys(), name
