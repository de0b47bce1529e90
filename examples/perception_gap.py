"""The papers' motivating experiments on real digits: who is learned too well, and whose perturbation matters.

    python examples/perception_gap.py                          # three seeds, a few minutes on two CPU cores
    python examples/perception_gap.py --run runs/rpat-0        # any run folder of `perceptual-at train`
    python examples/perception_gap.py --checkpoint model.pt --architecture resnet18 --images FOLDER

Part 1 (RPAT, Fig. 2): how far perturbations move the logits of samples that resist and of samples that give in,
after standard training, training on random noise, PGD-AT and PGD-AT+RPAT; and the movement along the way.
Part 2 (RAAT, Fig. 2): PGD-AT with the perturbation of boundary or of interior samples set to full, to the
threshold, or to none; and the threshold swept. Misclassified samples are trained on clean, as in the paper.
With a run folder, part 1 measures its best weights on its test images under its threat; with a checkpoint, that model
on images in FOLDER/test/CLASS. Part 2 is left out then.
Writes perception_gap.json and PNG files to --out.
"""

import argparse
import functools
import json
import os
import platform
import statistics
from pathlib import Path

import common
import torch
from torch.nn.functional import cross_entropy

import perceptual_at as pat
from perceptual_at import diagnostics, objectives, plotting
from perceptual_at.checkpoints import written_whole
from perceptual_at.data import digits, image_folder
from perceptual_at.models import DigitsCNN

THREAT = pat.Linf(eps=0.15)
ALPHAS = [i / 8 for i in range(9)]
LEARNERS = {"standard": "random", "random": "random", "PGD-AT": "pgd20", "PGD-AT+RPAT": "pgd20"}
GROUPS = {
    "full": {},
    "boundary reduced": {"boundary": "reduced"},
    "boundary clean": {"boundary": "clean"},
    "interior reduced": {"interior": "reduced"},
    "interior clean": {"interior": "clean"},
}
THRESHOLDS = (0.05, 0.1, 0.2, 0.4)


def learner_loss(name, model, x, labels, generator):
    """Training loss of part 1."""
    attack = functools.partial(pat.pgd, threat=THREAT, steps=10, generator=generator)
    if name == "standard":
        return cross_entropy(model(x), labels)
    if name == "random":
        return cross_entropy(model(THREAT.random_start(x, generator=generator)), labels)
    objective = objectives.pgd_at if name == "PGD-AT" else objectives.rpat
    return objective(model, (x,), labels, attack)[0]


def group_loss(model, x, labels, generator, threshold, strengths):
    """Training loss of part 2: PGD-AT with a perturbation that depends on the group."""
    x_adv = pat.pgd(model, x, labels, THREAT, steps=10, generator=generator)
    reduced = pat.pgd(model, x, labels, THREAT.scaled(threshold), steps=10, generator=generator)
    with pat.frozen(model) as f, torch.no_grad():
        parts = pat.boundary_partition(f(x), f(reduced), labels)
    return cross_entropy(model(diagnostics.perturbed_by_group(x, x_adv, reduced, parts, **strengths)), labels)


def train(loss_of, seed, epochs):
    """The same training for every loss."""
    torch.manual_seed(seed)
    model = DigitsCNN()
    noise, order = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(0.75 * epochs), int(0.9 * epochs)])
    for _ in range(epochs):
        model.train()
        for x, labels in common.Batches(*digits("train", seed=seed), generator=order):
            loss = loss_of(model, x, labels, noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return model


def perturbation(name, seed):
    """What the trained model is measured with."""
    generator = torch.Generator().manual_seed(seed)
    if name == "random":
        return functools.partial(diagnostics.random_noise, threat=THREAT, generator=generator)
    return functools.partial(pat.pgd, threat=THREAT, steps=20, generator=generator)


def measure_perception(model, batches, how, seed):
    """The gap between success and failure cases, and the movement along the path to PGD-20."""
    gap = diagnostics.perception_gap(model, batches, perturbation(how, seed))
    x, labels = batches[0]
    x_adv = perturbation("pgd20", seed)(model, x, labels)
    return gap, diagnostics.perception_path(model, x, x_adv, ALPHAS)


def run(part, name, seed, epochs):
    """One model of either part."""
    test = [digits("test", seed=seed)]
    if part == 1:
        model = train(functools.partial(learner_loss, name), seed, epochs)
        return measure_perception(model, test, LEARNERS[name], seed)
    threshold, strengths = (name, GROUPS["boundary reduced"]) if isinstance(name, float) else (0.1, GROUPS[name])
    model = train(functools.partial(group_loss, threshold=threshold, strengths=strengths), seed, epochs)
    result = pat.evaluate(model, test, {"pgd20": perturbation("pgd20", seed)}, progress=False)
    return 100 * result.clean_accuracy, 100 * result.robust_accuracy["pgd20"]


def joined(gaps):
    """The samples of all seeds as one gap."""
    return diagnostics.PerceptionGap(*(torch.cat([getattr(gap, field) for gap in gaps])
                                       for field in ("distance", "defended", "correct")))  # fmt: skip


def spread_text(pairs):
    """Mean and standard deviation of clean and robust accuracy."""
    columns = zip(*pairs, strict=True)
    return "  ".join(f"{statistics.mean(c):6.2f} ± {statistics.stdev(c) if len(c) > 1 else 0:.2f}" for c in columns)


def report_perception(gaps, paths, out):
    """Print and draw part 1."""
    print(
        f"\n{'trained on':<14}{'perturbed by':<14}{'success MSE':>12}{'failure MSE':>12}{'clean %':>9}{'robust %':>9}"
    )
    for name, gap in gaps.items():
        cells = [f"{value:12.3f}" if value is not None else f"{'none':>12}" for value in (gap.success, gap.failure)]
        how = LEARNERS.get(name, "pgd20")
        print(f"{name:<14}{how:<14}{''.join(cells)}{100 * gap.clean_accuracy:9.2f}{100 * gap.robust_accuracy:9.2f}")
    plotting.save(plotting.perception_bars(gaps), out / "perception_gap.png")
    plotting.save(plotting.perception_paths(ALPHAS, paths), out / "perception_path.png")


def report_groups(groups, sweep, out):
    """Print and draw part 2."""
    print(f"\n{'perturbation':<20}{'clean %':>15}{'PGD-20 %':>16}")
    for name, pairs in {**groups, **{f"threshold {t} eps": pairs for t, pairs in sweep.items()}}.items():
        print(f"{name:<20}{spread_text(pairs)}")
    ax = plotting.trade_off({**groups, **{f"boundary at {t} eps": sweep[t] for t in sweep}})
    ax.legend(frameon=False, fontsize=7)
    plotting.save(ax, out / "perturbation_by_group.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--workers", type=int, default=None, help="processes (default one per core)")
    parser.add_argument("--out", type=Path, default=Path("outputs/perception_gap"))
    parser.add_argument("--run", type=Path, help="folder of a finished run to measure instead of training any")
    parser.add_argument("--which", choices=["best", "final"], default="best", help="weights of --run")
    parser.add_argument("--checkpoint", type=Path, help="state dict of a model to measure instead of training any")
    parser.add_argument("--architecture", default="resnet18", help="function of perceptual_at.models")
    parser.add_argument("--images", type=Path, help="folder with test/CLASS/*.png")
    parser.add_argument("--eps", type=float, default=8 / 255, help="Linf budget for --checkpoint")
    parser.add_argument("--samples", type=int, default=1000, help="test images to measure for --run, --checkpoint")
    options = parser.parse_args()
    if options.run:
        measure_run(options)
        return
    if options.checkpoint:
        if not options.images:
            parser.error("--checkpoint needs --images")
        measure_checkpoint(options)
        return

    names = [(1, name) for name in LEARNERS] + [(2, name) for name in (*GROUPS, *THRESHOLDS)]
    jobs = [(part, name, seed, options.epochs) for part, name in names for seed in range(options.seeds)]
    results = common.spread(run, jobs, options.workers)

    def of(part, name):
        return [results[part, name, seed, options.epochs] for seed in range(options.seeds)]

    gaps = {name: joined([gap for gap, _ in of(1, name)]) for name in LEARNERS}
    paths = {name: torch.cat([path for _, path in of(1, name)], dim=1) for name in LEARNERS}
    groups, sweep = {name: of(2, name) for name in GROUPS}, {t: of(2, t) for t in THRESHOLDS}
    report_perception(gaps, paths, options.out)
    report_groups(groups, sweep, options.out)
    result = {
        "data": "scikit-learn digits", "threat": repr(THREAT), "seeds": options.seeds, "epochs": options.epochs,
        "command": f"python examples/perception_gap.py --seeds {options.seeds} --epochs {options.epochs}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "perceptual_at": pat.__version__},
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "threads_per_run": 1},
        "perception": {name: gap.to_dict() for name, gap in gaps.items()}, "groups": groups, "thresholds": sweep,
    }  # fmt: skip
    with written_whole(options.out / "perception_gap.json") as path:
        path.write_text(json.dumps(result, indent=2))
    print(f"\nwrote {options.out}")


def measure_checkpoint(options):
    """Part 1 for a model of the user's."""
    from perceptual_at import models

    images = image_folder(options.images, "test")
    loader = torch.utils.data.DataLoader(images, batch_size=100)
    batches = [batch for batch, _ in zip(loader, range(-(-options.samples // 100)), strict=False)]
    model = getattr(models, options.architecture)(num_classes=len(images.classes))
    model.load_state_dict(torch.load(options.checkpoint, weights_only=True, map_location="cpu"))
    report_model(options.checkpoint.stem, model, batches, pat.Linf(options.eps), options.out)


def measure_run(options):
    """Part 1 for the weights of a run, whatever its network, images and threat."""
    from perceptual_at.commands.evaluating.targets import chosen_rows, targets_of
    from perceptual_at.commands.evaluating.wishes import Models, Samples, Wishes
    from perceptual_at.commands.ingredients.images import batches, images_of

    wishes = Wishes(models=Models(run=(options.run,), which=options.which), images=Samples(samples=options.samples))
    try:
        (target,) = targets_of(wishes)
        images = images_of(target.images, "test")
        rows = torch.split(chosen_rows(images, wishes), 100)
        served = list(batches(images, rows, workers=0))
        report_model(target.name, target.made(images), served, target.threat, options.out)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"perception_gap.py: {error}") from error


def report_model(name, model, batches, threat, out):
    """The gap under noise and under PGD-20, and the movement along the path of the first batch."""
    pgd20 = functools.partial(pat.pgd, threat=threat, steps=20)
    noise = functools.partial(diagnostics.random_noise, threat=threat)
    gaps = {how: diagnostics.perception_gap(model, batches, p) for how, p in (("random", noise), ("pgd20", pgd20))}
    x, labels = batches[0]
    path = diagnostics.perception_path(model, x, pgd20(model, x, labels), ALPHAS)
    report_perception(gaps, {name: path}, out)


if __name__ == "__main__":
    main()
