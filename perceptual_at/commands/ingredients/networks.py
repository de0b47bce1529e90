"""The network of a run: by name, with given first weights, parts of it frozen, tried before the first step."""

import ast
import contextlib
import copy
import dataclasses
import fnmatch
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from perceptual_at import data, models
from perceptual_at.averaging import call_with, snapshot
from perceptual_at.checkpoints import load_weights, read_weights
from perceptual_at.commands.options.settings import Network, Optimisation
from perceptual_at.commands.options.words import meant, number_in, option, pairs
from perceptual_at.data import channel_statistics
from perceptual_at.models.folding import FoldedClasses

OWN: dict[str, Callable[..., nn.Module]] = {
    "resnet18": models.resnet18, "resnet26_bottleneck": models.resnet26_bottleneck,
    "preact_resnet18": models.preact_resnet18, "wide_resnet28_10": models.wide_resnet28_10,
    "wide_resnet34_10": models.wide_resnet34_10, "digits_cnn": models.DigitsCNN,
}  # fmt: skip
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Task(NamedTuple):
    """What a network has to fit."""

    channels: int
    classes: int
    images: Tensor
    """Some training images, for their statistics; the first and the last for a trial."""


def network(chosen: Network, task: Task, *, seed: int) -> nn.Module:
    """The network for these images, with its first weights drawn from the seed, as yet without those of `--init`.

    Raises:
        ValueError: if the name means no network, or its options do not fit.
        ImportError: if a package that it comes from is not installed.
    """
    if chosen.dummies:
        plain = dataclasses.replace(chosen, dummies=False)
        return models.fold_classes(network(plain, task._replace(classes=2 * task.classes), seed=seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _made(chosen, task)
        if chosen.cosines is not None:
            model = models.with_cosine_logits(model, scale=chosen.cosines)
        if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
            _pass(model.eval(), task, chosen.model)  # gives lazy layers their shapes
            model.train()
    if chosen.normalize == "none":
        return model
    statistics = {"cifar10": (data.CIFAR10_MEAN, data.CIFAR10_STD), "imagenet": IMAGENET}.get(chosen.normalize)
    mean, std = statistics or channel_statistics(task.images)
    if len(mean) != task.channels:
        raise ValueError(
            f"--normalize {chosen.normalize} has {len(mean)} channels but images have {task.channels}; take own."
        )
    spread = tuple(max(value, 1e-3) for value in std)  # a channel may be the same in all images
    return models.normalized(model, mean, spread)


def _made(chosen: Network, task: Task) -> nn.Module:
    place, colon, name = chosen.model.partition(":")
    if not colon:
        return _own(chosen, task)
    for setting in ("width", "stem_stride"):
        if getattr(chosen, setting) != getattr(Network(), setting):
            raise ValueError(f"{option(setting)} is for networks of this package; write it into --model module:f(...).")
    if place == "torchvision":
        return _from_torchvision(name, task)
    if place == "timm":
        timm = _imported("timm", "--model timm:NAME needs timm; run `pip install timm`.")
        function, positional, named = call_of(name)
        try:
            made: nn.Module = timm.create_model(
                function, *positional, **{"num_classes": task.classes, "in_chans": task.channels, **named}
            )
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"--model {chosen.model}: {error}") from error
        return made
    return called(chosen.model)


def _own(chosen: Network, task: Task) -> nn.Module:
    if chosen.model not in OWN:
        raise ValueError(
            f"--model knows {', '.join(OWN)}, torchvision:NAME, timm:NAME and module:function(...), not "
            f"{chosen.model!r}{meant(chosen.model, OWN)}."
        )
    options: dict[str, Any] = {"num_classes": task.classes}
    if chosen.model == "digits_cnn":
        if task.channels != 1:
            raise ValueError(f"--model digits_cnn takes images of one channel, these have {task.channels}.")
        if chosen.stem_stride != 1:
            raise ValueError("--stem-stride has no effect with --model digits_cnn.")
    else:
        options |= {"in_channels": task.channels, "stem_stride": chosen.stem_stride}
    if chosen.width is not None:
        options["width"] = chosen.width
    return OWN[chosen.model](**options)


def _from_torchvision(name: str, task: Task) -> nn.Module:
    zoo = _imported("torchvision.models", "--model torchvision:NAME needs torchvision; run `pip install torchvision`.")
    function, positional, named = call_of(name)
    if function not in zoo.list_models(module=zoo):
        close = meant(function, zoo.list_models(module=zoo))
        raise ValueError(f"--model torchvision:{function}: there is no such classifier{close}.")
    if function in ("googlenet", "inception_v3"):
        named = {"aux_logits": False, "init_weights": True, **named}
    try:
        made: nn.Module = zoo.get_model(function, *positional, **{"num_classes": task.classes, **named})
    except (TypeError, ValueError) as error:
        raise ValueError(f"--model torchvision:{name}: {error}") from error
    return made


def called(words: str) -> nn.Module:
    """The module that `module:function(...)` gives. Code is looked for in the working folder too.

    Raises:
        ValueError: if the words mean no call with literals, or what is called gives no module.
        ImportError: if the module cannot be imported.
    """
    place, _, name = words.partition(":")
    path, positional, named = call_of(name)
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    with torch.random.fork_rng(devices=[]):  # what a module draws when it is imported it draws once, whatever the seed
        found = _imported(place, f"--model {words}: there is no module {place!r}, here or installed.")
    for part in path.split("."):
        if not hasattr(found, part):
            raise ValueError(f"--model {words}: {place} has no {path!r}{meant(part, dir(found))}.")
        found = getattr(found, part)
    if isinstance(found, nn.Module) or not callable(found):
        raise ValueError(f"--model {words}: {path!r} is no function.")
    try:
        model = found(*positional, **named)
    except (Exception, SystemExit) as error:  # code of the user's own
        raise ValueError(f"--model {words} raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {words} must give a torch.nn.Module, got {type(model).__name__}.")
    return model


def call_of(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """`function(...)` as its name, its positional and its named arguments, which are literals."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        if not all(isinstance(node, (ast.Name, ast.Attribute)) for node in _path(call.func)):
            raise ValueError
        named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg is not None}
        if len(named) != len(call.keywords):
            raise ValueError
        return ast.unparse(call.func), [ast.literal_eval(argument) for argument in call.args], named
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(
            f"--model: {text!r} must be function or function(...) with literals: numbers, texts, True, None, lists, "
            "tuples, dicts."
        ) from error


def _path(node: ast.expr) -> list[ast.expr]:
    return [node, *(_path(node.value) if isinstance(node, ast.Attribute) else [])]


def _imported(name: str, missing: str) -> Any:
    """A module; that it is missing is another thing than that it fails."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ImportError(missing) from error
        raise ImportError(f"importing {name!r} failed: {error}") from error
    except (ImportError, SyntaxError, TypeError, ValueError) as error:
        raise ImportError(f"importing {name!r} failed: {error}") from error
    except SystemExit as error:  # a script that runs when it is imported
        raise ImportError(f"importing {name!r} ended it (exit status {error.code}); it must only define.") from error


# First weights, frozen parts, groups -------------------------------------------------------------------------------


def initialise(model: nn.Module, path: Path) -> str:
    """Take what fits from a file of weights; gives a line that says what was taken and what not."""
    if not path.is_file():
        raise ValueError(f"--init: there is no file `{path}`.")
    stored = read_weights(path).keys()
    # Inside `normalized`, names differ.
    part = max(_inside(model), key=lambda place: len(place.state_dict().keys() & stored))
    loaded = load_weights(part, path, strict=False)
    total = len(part.state_dict())
    left = f"; left as they were: {_some(loaded.missing)}" if loaded.missing else ""
    ignored = f"; not used: {_some(loaded.ignored)}" if loaded.ignored else ""
    return f"--init {path}: {total - len(loaded.missing)} of {total} tensors taken{left}{ignored}"


def load(model: nn.Module, path: Path) -> None:
    """Put a file's weights into a network, or into the one in it that is all of it but layers without weights.

    So a file of a network fits `normalized` around it.

    Raises:
        ValueError: as `load_weights`, of the whole network.
    """
    try:
        load_weights(model, path)
    except ValueError:
        for part in list(_inside(model))[1:]:
            if len(list(part.parameters())) == len(list(model.parameters())):
                with contextlib.suppress(ValueError):
                    load_weights(part, path)
                    return
        raise


def _inside(model: nn.Module) -> Iterator[nn.Module]:
    """The network, and what stands in it where it is a wrapper around another."""
    yield model
    if isinstance(model, (nn.Sequential, FoldedClasses)):
        for part in model.children():
            yield from _inside(part)


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """Parameters whose names fit a pattern take no more steps."""
    names = dict(model.named_parameters())
    for pattern in patterns:
        fitting = fnmatch.filter(names, pattern)
        if not fitting:
            raise ValueError(f"--freeze {pattern}: no parameter has such a name; they are {_some(list(names))}.")
        for name in fitting:
            names[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise ValueError(f"{'--freeze' if patterns else '--model'} leaves nothing to train.")


def parameter_groups(model: nn.Module, chosen: Optimisation) -> list[dict[str, Any]]:
    """What the optimiser gets: parameters with their weight decay, a group for each pattern and one for the rest."""
    decays = {}
    for pattern, text in pairs("weight_decay_of", chosen.weight_decay_of).items():
        try:
            decays[pattern] = number_in(text)
        except ValueError as error:
            raise ValueError(f"--weight-decay-of {pattern}: {error}.") from error
        if decays[pattern] < 0:
            raise ValueError(f"--weight-decay-of {pattern}={text} must be at least 0.")
        if not fnmatch.filter([name for name, _ in model.named_parameters()], pattern):
            raise ValueError(f"--weight-decay-of {pattern}: no parameter has such a name.")
    groups: dict[str | None, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            fitting = next((pattern for pattern in decays if fnmatch.fnmatch(name, pattern)), None)
            groups.setdefault(fitting, []).append(parameter)
    return [
        {"params": held, "weight_decay": chosen.weight_decay if pattern is None else decays[pattern]}
        for pattern, held in groups.items()
    ]


def tried(model: nn.Module, task: Task, name: str) -> None:
    """Run a copy of the network on a few images, in both modes.

    Raises:
        ValueError: if it fails, or gives something else than logits for these classes.
    """
    for mode in (True, False):
        trial = copy.deepcopy(model).train(mode)
        measured = functools.partial(call_with, trial, snapshot(trial))
        logits = _pass(trial if mode else measured, task, name)
        when = "in train mode" if mode else "in eval mode"
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"--model {name} gives {type(logits).__name__} {when}, not logits; wrap it in a function that returns "
                "perceptual_at.models.logits_of(model, ...)."
            )
        if logits.ndim != 2 or logits.shape[1] < task.classes:
            raise ValueError(
                f"--model {name} gives outputs of shape {tuple(logits.shape)} {when}; wanted are logits "
                f"(2, K) with K of at least {task.classes} classes."
            )
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(f"--model {name} gives logits that are not finite {when}.")


def _pass(run: Callable[[Tensor], Any], task: Task, name: str) -> Any:
    """What the network gives for two images."""
    images = task.images[[0, -1]]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            return run(images)
        except Exception as error:  # of the network's own
            text = str(error).partition("\n")[0]
            raise ValueError(
                f"--model {name} fails on images of shape {tuple(images.shape[1:])}: {type(error).__name__}: {text}"
            ) from error
