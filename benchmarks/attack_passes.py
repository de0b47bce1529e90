"""One PGD-10 attack: what it costs in units of K (F + Bx), ours plain and in the lanes, the releases' and the peers'.

    python benchmarks/attack_passes.py --out docs/results/attack_passes.json

The unit is K times a forward and an input-gradient pass of the bare model, with parameters that need no gradient and no
attack around it. All start at the clean images, so all should find the same adversarial images; the record says how far
they do.
"""

import functools
from collections.abc import Callable, Sequence

import releases
import torch
from cases import COMPILED, LANES, STEP_SIZE, STEPS, THREAT, Case, case
from passes import passes
from peers import Budget, peers
from record import begin, parser, save
from timing import compared, interleaved
from torch.nn.functional import cross_entropy

from perceptual_at import frozen, pgd

UNIT = "K (F + Bx)"


def unit(found: Case, steps: int) -> torch.Tensor:
    """The passes of the attack, and nothing else."""
    with frozen(found.model) as f:
        for _ in range(steps):
            x = found.x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(cross_entropy(f(x), found.labels, reduction="sum"), x)
    return slope


def attacks(found: Case, steps: int, *, compiled: bool) -> dict[str, Callable[[], torch.Tensor] | str]:
    """Every way to run the attack, by its name in the table."""
    model, x, labels = found
    ours = functools.partial(pgd, model, x, labels, THREAT, steps=steps, step_size=STEP_SIZE, start="clean")
    release = {"steps": steps, "noise": 0.0}
    return {
        UNIT: functools.partial(unit, found, steps),
        **{f"pgd, {name}": functools.partial(ours, lane=lane) for name, lane in LANES.items()},
        **{f"pgd, {name}": functools.partial(ours, lane=lane) for name, lane in COMPILED.items() if compiled},
        "releases' PGD": functools.partial(releases.pgd, model, x, labels, **release),
        "TRADES' loop": functools.partial(releases.trades_attack, model, x, **release | {"noise": 0.001}),
        "MART's loop": functools.partial(releases.pgd_to_input, model, x, labels, **release),
        **peers(model, x, labels, Budget(steps=steps)),
    }


def measured(found: Case, steps: int, rounds: int, *, compiled: bool) -> list[dict[str, object]]:
    """One table: a row for every attack."""
    everything = attacks(found, steps, compiled=compiled)
    functions = {name: attack for name, attack in everything.items() if callable(attack)}
    results = {name: attack() for name, attack in functions.items()}
    alike = set(results) - {UNIT, "TRADES' loop"}  # the former attacks nothing, the latter ascends another loss
    # After a first call, which may prepare. A compiled network shows none of its operations: no counts.
    counts = {
        name: passes(attack, found.model, len(found.x)) for name, attack in functions.items() if "compiled" not in name
    }
    times = compared(interleaved(functions, rounds=rounds, device=found.x.device, warmup=0), UNIT)
    return [
        {
            "name": name,
            "missing": attack if isinstance(attack, str) else None,
            "passes": counts.get(name),
            "same_entries": same(results[name], results["pgd, plain"]) if name in alike else None,
            **times.get(name, {}),
        }
        for name, attack in everything.items()
    ]


def same(x_adv: torch.Tensor, reference: torch.Tensor) -> float:
    """Share of entries that two attacks perturbed alike."""
    return round((x_adv.to(reference) - reference).abs().le(1e-6).double().mean().item(), 4)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__file__, __doc__, rounds=7)
    options.add_argument("--compile", action="store_true", help="compiled lanes too; starting takes minutes")
    options.add_argument("--settings", nargs="+", default=["64x16", "16x64"], help="width x batch, one table each")
    options = begin(options, arguments)
    settings, steps, side = (["4x4"], 2, 16) if options.quick else (options.settings, STEPS, 32)
    tables = []
    for width, batch in (map(int, setting.split("x")) for setting in settings):
        found = case(batch, width=width, side=side, device=options.device, seed=options.seed)
        rows = measured(found, steps, options.rounds, compiled=options.compile)
        tables.append({"network": "ResNet-18", "width": width, "batch": batch, "rows": rows})
        for row in rows:
            print(width, batch, row["name"], row["missing"] or (row["wall_s"], row["ratio_wall"], row["passes"]))
    save(options, {"threat": repr(THREAT), "steps": steps, "step_size": STEP_SIZE, "start": "clean"}, tables=tables)


if __name__ == "__main__":
    main()
