"""The options that all benchmarks share, and the record each of them leaves: what ran, where, on which code."""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import perceptual_at
from perceptual_at.checkpoints import written_whole

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch", "torchattacks", "foolbox", "adv-lib", "pyautoattack", "adversarial-robustness-toolbox", "scipy",
)  # fmt: skip


def parser(script: str, description: str, *, rounds: int) -> argparse.ArgumentParser:
    """Options of a benchmark; `script` is its `__file__`."""
    name = Path(script).stem
    options = argparse.ArgumentParser(
        prog=f"{name}.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, default=ROOT / "outputs" / f"{name}.json")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--threads", type=int, default=2, help="of torch, on a CPU")
    options.add_argument("--rounds", type=int, default=rounds, help="how often each function takes its turn")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--quick", action="store_true", help="a miniature that only shows that the script runs")
    return options


def begin(options: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The chosen options, with threads and seed set and the command to record; a miniature has two rounds at most."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    chosen = options.parse_args(words)
    chosen.command = " ".join(["python", f"benchmarks/{options.prog}", *without(words, "--out")])
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(chosen.seed)
    if chosen.quick:
        chosen.rounds = min(chosen.rounds, 2)
    return chosen


def save(options: argparse.Namespace, settings: Mapping[str, Any], **found: Any) -> None:
    """Write the record of a run."""
    record = {
        "command": options.command,
        "quick": options.quick,
        "seed": options.seed,
        "rounds": options.rounds,
        "settings": dict(settings),
        **provenance(options.device),
        **found,
    }
    write(options.out, record)


def write(out: Path, record: Mapping[str, Any]) -> None:
    """Write a record at its place, whole or not at all."""
    with written_whole(out) as path:
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def provenance(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Commit, versions and hardware of this process."""
    installed = {name: version(name) for name in PACKAGES}
    return {
        "commit": commit(),
        "versions": {
            "python": platform.python_version(), "perceptual_at": perceptual_at.__version__,
            **{name: found for name, found in installed.items() if found},
            **({"cuda": torch.version.cuda} if torch.device(device).type == "cuda" else {}),
        },
        "hardware": {
            "device": device_name(device), "cpu": cpu_name(), "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
    }  # fmt: skip


def commit() -> str | None:
    """The commit of the code, with a mark where files differ from it; None outside a clone."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" and changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def version(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device | str) -> str:
    """What the benchmark ran on."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cpu_name() -> str:
    """The processor, as the system calls it."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({platform.machine()})"


def without(words: Sequence[str], option: str) -> list[str]:
    """The words of a command but for an option and its value."""
    values = {place + 1 for place, word in enumerate(words) if word == option}
    return [
        word for place, word in enumerate(words)
        if place not in values and word != option and not word.startswith(f"{option}=")
    ]  # fmt: skip
