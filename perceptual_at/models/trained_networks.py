"""Trained networks that come with the package: small, robust, read without any further package."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perceptual_at.models.resnets import preact_resnet18, resnet18

FOLDER = Path(__file__).parent / "weights"
"""For each network a safetensors file and its card, `NAME.safetensors` and `NAME.json`."""

_BUILDERS = {"resnet18": resnet18, "preact_resnet18": preact_resnet18}


def trained(name: str) -> nn.Module:
    """A network with its trained weights, in eval mode, on the CPU; nothing is downloaded.

    Args:
        name: which one; `trained_card` says what it is, and an unknown name lists all.

    Returns:
        The network. It takes images in [0, 1] and returns logits.

    Raises:
        ValueError: if there is no network of that name, or its file is not the one that its card describes.
    """
    card = _card("trained", name)
    path = FOLDER / f"{name}.safetensors"
    raw = path.read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if found != card["sha256"]:
        raise ValueError(
            f"trained: `{path}` has the SHA-256 {found}, its card says {card['sha256']}; it was changed or damaged. "
            "Install the package again."
        )
    model: nn.Module = _BUILDERS[card["network"]](**card["options"])
    model.load_state_dict(_tensors(raw))
    return model.eval()


def trained_card(name: str) -> dict[str, Any]:
    """What a trained network is: data, settings, scores, limits, checksum.

    Args:
        name: which one.

    Returns:
        The card, as it lies beside the weights.

    Raises:
        ValueError: if there is no network of that name.
    """
    return _card("trained_card", name)


def _card(function: str, name: str) -> dict[str, Any]:
    names = sorted(card.stem for card in FOLDER.glob("*.json"))
    if not isinstance(name, str) or name not in names:
        raise ValueError(
            f"{function}: `name` must be one of {', '.join(map(repr, names)) or 'none yet'}, got {name!r}."
        )
    card: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return card


_DTYPES = {"F32": torch.float32, "I64": torch.int64}


def _tensors(raw: bytes) -> dict[str, Tensor]:
    """The tensors of a whole safetensors file: eight bytes of length, a header in JSON, the data."""
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    data = bytearray(raw[start:])
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            dtype = _DTYPES[entry["dtype"]]
            tensors[name] = torch.frombuffer(data[begin:end], dtype=dtype).reshape(entry["shape"])
    return tensors
