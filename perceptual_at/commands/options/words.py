"""Words of the command line that are no plain numbers or texts: fractions, amounts, places, names."""

import difflib
import typing
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Annotated, Any

import tyro


def number_in(text: str) -> float:
    """A finite number, also as a fraction: `8/255`."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"{text!r} is no number; write it as 0.03 or 8/255") from error


def amount(text: str) -> int | float | None:
    """How many: a count of images, or a share of them up to 1: `1` is one image, `1.0` are all."""
    if text == "None":
        return None
    value = number_in(text)
    if text.lstrip("+").isdecimal():
        return int(text)
    if not 0 < value <= 1:
        raise ValueError(f"{text!r} is neither a count nor a share, a number above 0 and up to 1")
    return value


def place(text: str) -> float | str | None:
    """A place on the path: a number, or what it is drawn from."""
    if text == "None":
        return None
    return text if text in ("beta", "beta-", "beta+") else number_in(text)


def _spec(metavar: str, read: Any, kinds: type | tuple[type, ...]) -> Any:
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: isinstance(value, kinds),
        str_from_instance=lambda value: [shown(value)],
    )


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, float) and value and abs(value) < 1:
        fraction = Fraction(value).limit_denominator(255)
        return str(fraction) if fraction.denominator == 255 and float(fraction) == value else f"{value:g}"
    return str(value)


Number = Annotated[float, _spec("NUMBER", number_in, float)]
Amount = Annotated[int | float | None, _spec("COUNT|SHARE", amount, (int, float, type(None)))]
Place = Annotated[float | str | None, _spec("NUMBER|beta|beta-|beta+", place, (float, str, type(None)))]


def option(name: str) -> str:
    """A setting as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def meant(word: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)` where something known is like the word, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def literals(kind: Any) -> tuple[str, ...]:
    """The words among the types that an argument may have."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return arguments
    return tuple(word for part in arguments for word in literals(part))


def pairs(name: str, words: Sequence[str]) -> dict[str, str]:
    """Words of the form `name=value` as a dict."""
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals and value):
            raise ValueError(f"{option(name)} takes name=value, got {word!r}.")
        if key in found:
            raise ValueError(f"{option(name)} gives {key!r} twice.")
        found[key] = value
    return found
