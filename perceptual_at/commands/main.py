"""The entry point: which command was meant, and what its ending says."""

import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    "train": "train a network adversarially, or go on with a run",
    "evaluate": "attack a model, or the models of run folders",
    "compare": "test whether one model is better than another",
    "table": "make the papers' table of run folders",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command of the command line.

    Args:
        arguments: the words behind `perceptual-at`; those of the process if left out.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        _make_outputs_bearable()
    shown = "\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items())
    usage = f"usage: perceptual-at COMMAND ...\n\n{shown}\n\n`perceptual-at COMMAND --help` says more of each."
    if words and words[0] in ("-h", "--help"):
        print(usage)
        return
    if not words or words[0] not in COMMANDS:
        got = f"there is no command {words[0]!r}; there are " if words else "say which command: "
        print(f"perceptual-at: {got}{', '.join(COMMANDS)}. `perceptual-at --help` says more.", file=sys.stderr)
        raise SystemExit(2)
    try:
        command = importlib.import_module(f"perceptual_at.commands.{words[0]}").command
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "perceptual_at":
            raise
        brings = f"`pip install {missing}` brings it, the extra `train` all"
        sys.exit(f"perceptual-at {words[0]}: {missing} is not installed; {brings}.")
    except KeyboardInterrupt:  # importing takes seconds
        print(f"perceptual-at {words[0]}: interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
    command(words[1:])


def _make_outputs_bearable() -> None:
    """Letters that an output lacks, as in the name of a file, end nothing, and what is closed takes all."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started the process
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
