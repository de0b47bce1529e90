"""From the words of a command line to settings: a recipe or a printed row, and options that change it."""

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from perceptual_at.commands.options import method
from perceptual_at.commands.options.effects import refuse_idle
from perceptual_at.commands.options.recipes import FAMILIES, RECIPES
from perceptual_at.commands.options.recipes.rows import row_named, settings_of_row
from perceptual_at.commands.options.settings import Method, Settings
from perceptual_at.commands.options.trial import refuse_values
from perceptual_at.commands.options.words import meant

Read = TypeVar("Read")

PROGRAM = "perceptual-at train"
INTRODUCTION = """usage: perceptual-at train RECIPE [OPTIONS]
       perceptual-at train --row PAPER/TABLE/DATASET/NORM/NETWORK/METHOD [OPTIONS]

Train any objective on any data with any network and threat; kill it at any moment and go on with --resume.
A recipe is a set of defaults, the settings of a paper as its released code ran them; every option changes one.
`perceptual-at train RECIPE --help` shows the options with the values of that recipe. Networks of your own are
--model "module:function(...)": that imports code, also from the working folder.
"""


def settings_of(arguments: Sequence[str]) -> Settings:
    """The settings that the words of a command line mean; help is printed and ends the process.

    Raises:
        ValueError: if words are unknown or values do not fit.
    """
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--row=") else [word])]
    start, named = Settings(), ""
    if "--row" in words:
        place = words.index("--row")
        if place + 1 == len(words):
            raise ValueError("--row needs the name of a row.")
        recipe, start = settings_of_row(row_named(words[place + 1]), RECIPES)
        named = f"{recipe} (for {words[place + 1]})"
        words = words[:place] + words[place + 2 :]
    elif words and not words[0].startswith("-"):
        named, words = words[0], words[1:]
        if named not in RECIPES:
            raise ValueError(f"there is no recipe {named!r}{meant(named, RECIPES)}; `{PROGRAM} --help` lists them.")
        start = RECIPES[named].settings
    elif not words or {"-h", "--help"} & set(words):
        print(listing())
        raise SystemExit(0 if words else 2)
    else:
        raise ValueError(f"a recipe comes first, as in `{PROGRAM} rpat {' '.join(words)}`; --help lists them.")
    if {"-h", "--help"} & set(words):
        others = [word for word in words if word not in ("-h", "--help")]
        read = _read(others, start)
        shown = dataclasses.replace(read, method=_with_values(read.method))
        parse([*others, "--help"], Settings, shown, f"{PROGRAM} {named}")
    settings = _read(words, start)
    refuse_values(settings)
    return settings


def _read(words: list[str], start: Settings) -> Settings:
    settings = parse(words, Settings, start, PROGRAM)
    method.check(settings)
    refuse_idle(given_in(words), settings)
    return settings


def given_in(words: Sequence[str]) -> set[str]:
    """The options that are named in words, as the settings are called."""
    names = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    return names | {name.removeprefix("no_") for name in names}


def _with_values(chosen: Method) -> Method:
    """The same method with the values that options left to the objective really have, for help to show."""
    fields = {field.name for field in dataclasses.fields(Method)}
    return dataclasses.replace(chosen, **{n: v for n, v in method.effective(chosen).items() if n in fields})


def parse(words: Sequence[str], kind: type[Read], default: Read, program: str, *, description: str = "") -> Read:
    """A frozen value from words, by tyro; what is wrong with them as one line.

    Raises:
        ValueError: if words are unknown or values do not fit.
    """
    said, width = io.StringIO(), os.environ.get("COLUMNS")
    # Recipes turn flags on, so `train` can turn them off again; elsewhere `--no-flag` would say what is so anyway.
    flags = () if kind is Settings else (tyro.conf.FlagCreatePairsOff,)
    helping = "--help" in words or "-h" in words
    try:
        if not helping:
            os.environ["COLUMNS"] = "1000"  # so that no line is broken
        with contextlib.nullcontext() if helping else contextlib.redirect_stderr(said):
            read: Read = tyro.cli(
                kind, args=list(words), default=default, prog=program, description=description or None,
                config=(tyro.conf.OmitArgPrefixes, *flags),
            )  # fmt: skip
        return _at_home(read)
    except SystemExit as end:
        if end.code in (0, None):
            sys.stdout.flush()
            raise
        raise ValueError(_one_line(said.getvalue())) from None
    finally:
        if width is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = width


def _at_home(read: Read) -> Read:
    """The same with the `~` of its paths spelt out: shells leave that of `--out=~/runs` to the program."""
    found: Any = read
    if isinstance(read, Path):
        found = Path(os.path.expanduser(read))  # noqa: PTH111  # leaves a home that nobody has
    elif isinstance(read, tuple):
        found = tuple(map(_at_home, read))
    elif dataclasses.is_dataclass(read) and not isinstance(read, type):
        parts = {part.name: _at_home(getattr(read, part.name)) for part in dataclasses.fields(read)}
        found = dataclasses.replace(read, **parts)
    made: Read = found
    return made


def _one_line(box: str) -> str:
    """What a box of tyro's says, without its frame: the problem, and the option that was perhaps meant."""
    box = re.sub(r"\x1b\[[0-9;]*m", "", box)  # colours
    inside = [line.strip(" │|") for line in box.splitlines() if line.strip() and not re.match(r"\s*[╭╰+]", line)]
    if len(inside) > 1 and not inside[1].strip("-"):  # without a frame, the title is a line above a rule
        inside = inside[2:]
    lines = [line for line in inside if line.strip("─- ")]
    problem = next((line for line in lines if not line.startswith("For full helptext")), "the words make no sense.")
    wanted = next((lines[i + 1] for i, line in enumerate(lines[:-1]) if line.startswith("Perhaps you meant")), "")
    got = [line.removeprefix("- ").partition(": ")[2] for line in lines if line.startswith("- <class")]
    problem = problem.removeprefix("Error parsing Settings: ").rstrip(":.") + (f" ({got[-1]})" if got else "")
    said = f"{problem}{f' (did you mean {wanted.split()[0]}?)' if wanted else ''}"
    return said if said.endswith("?") else f"{said}."


def listing() -> str:
    """The recipes by family."""
    lines = [INTRODUCTION]
    for family, module in FAMILIES.items():
        if module.RECIPES:
            lines.append(f"{family}:")
            lines += [f"  {name:<28} {made.title}" for name, made in module.RECIPES.items()]
            lines.append("")
    return "\n".join(lines)
