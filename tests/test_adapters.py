"""Networks that return more than logits, through `logits_of`."""

import collections
import copy
import dataclasses
import functools
import pickle
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from perceptual_at import Lane, Linf, call_with, ema_update, evaluate, frozen, objectives, pgd, snapshot
from perceptual_at.models import (
    CosineLinear,
    DigitsCNN,
    fold_classes,
    from_joined,
    logits_of,
    normalized,
    perceive_at,
    perception_taps,
    tap,
    whole_batches,
    with_cosine_logits,
)
from tests.strategies import integers, uniform


class Named(NamedTuple):
    features: Tensor
    logits: Tensor


@dataclasses.dataclass
class Plain:
    features: Tensor
    logits: Tensor


class ModelOutput(collections.OrderedDict):
    """Keys, attributes and indices, as in Transformers."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


def dictionary(features, logits):
    return {"features": features, "logits": logits}


def model_output(features, logits):
    return ModelOutput(features=features, logits=logits)


def pair(features, logits):
    return features, logits


def alone(features, logits):
    return logits


KINDS = [
    (dictionary, "logits"),
    (model_output, "logits"),
    (model_output, 1),
    (model_output, -1),
    (Named, "logits"),
    (Named, 1),
    (Plain, "logits"),
    (pair, 1),
    (pair, -1),
    (alone, "logits"),
    (alone, 0),
]
every_kind = pytest.mark.parametrize(
    ("make", "output"), KINDS, ids=[f"{make.__name__} {output}" for make, output in KINDS]
)


class Network(nn.Module):
    """A classifier with batch norm that packs its logits."""

    def __init__(self, make=dictionary):
        super().__init__()
        self.make = make
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.head = nn.Linear(6, 4)

    def forward(self, pixels):
        features = self.body(pixels)
        return self.make(features, self.head(features))

    def logits(self, pixels):
        return self.head(self.body(pixels))


def network(make=dictionary):
    torch.manual_seed(0)
    return Network(make)


x = uniform(0, 5, 3, 2, 2, dtype=torch.float32)
labels = integers(1, 5, below=4)
attack = functools.partial(pgd, threat=Linf(8 / 255), steps=2)


# What comes out ---------------------------------------------------------------------------------------------------


@every_kind
def test_the_logits_are_those_of_the_network(make, output):
    model = network(make).eval()
    assert torch.equal(logits_of(model, output)(x), model.logits(x))


@pytest.mark.slow
def test_a_named_tuple_in_train_mode_only_as_torchvisions_googlenet_returns_it():
    from torchvision.models import GoogLeNet

    with torch.device("meta"):  # shapes without arithmetic
        model, images = logits_of(GoogLeNet(num_classes=3, init_weights=False), "logits"), torch.rand(2, 3, 64, 64)
    assert type(model.model(images)).__name__ == "GoogLeNetOutputs"
    assert model(images).shape == (2, 3)
    model.eval()
    assert model.model(images).shape == model(images).shape == (2, 3)


def test_an_images_keyword_and_the_tokens_of_the_class_names():
    class Pair(nn.Module):
        """A CLIP-like pair: images are compared with encoded texts."""

        def __init__(self):
            super().__init__()
            self.images, self.texts = nn.Linear(12, 5), nn.Embedding(9, 5)

        def forward(self, input_ids, pixel_values=None, scale=1.0):
            images = nn.functional.normalize(self.images(pixel_values.flatten(1)), dim=1)
            texts = nn.functional.normalize(self.texts(input_ids).mean(dim=1), dim=1)
            return model_output(images, scale * images @ texts.T)

    tokens = integers(2, 4, 6, below=9)
    model = logits_of(
        Pair(), "logits", input_name="pixel_values", fixed_inputs={"input_ids": tokens, "scale": 20.0}
    ).eval()
    assert torch.equal(model(x), model.model(tokens, x, 20.0)["logits"])
    assert sorted(model.state_dict()) == ["model.images.bias", "model.images.weight", "model.texts.weight"]
    x_adv = pgd(model, x, labels, Linf(0.05))
    assert (model(x_adv).argmax(1) == labels).sum() <= (model(x).argmax(1) == labels).sum()
    assert model.to("meta")(x.to("meta")).device.type == "meta"  # the tokens moved with the weights


# It stays a module ------------------------------------------------------------------------------------------------


def test_modes_are_shared_and_as_found():
    inner = network()
    inner.body[2].eval()  # frozen by hand
    model = logits_of(inner, "logits")
    assert model.training
    assert not inner.body[2].training
    model.eval()
    assert not any(part.training for part in inner.modules())
    assert not logits_of(network().eval(), "logits").training


def test_weights_of_the_network_load_and_those_of_the_adapter_too():
    trained, model = network(), logits_of(network(), "logits")
    nn.init.ones_(trained.head.weight)
    model.load_state_dict(trained.state_dict())
    assert torch.equal(model.model.head.weight, trained.head.weight)
    nn.init.zeros_(model.model.head.weight)
    model.load_state_dict(logits_of(trained, "logits").state_dict())
    assert torch.equal(model.model.head.weight, trained.head.weight)
    around = normalized(model, (0.5,) * 3, (0.5,) * 3)
    assert around.load_state_dict(around.state_dict()).missing_keys == []
    with pytest.raises(RuntimeError, match="head"):
        model.load_state_dict({"body.1.weight": trained.body[1].weight})


def test_attacks_find_the_module_behind_it():
    model = logits_of(network(), "logits").train()
    before = snapshot(model)
    expected = pgd(nn.Sequential(Head(model.model)), x, labels, Linf(0.1), start="clean")
    assert torch.equal(pgd(model, x, labels, Linf(0.1), start="clean"), expected)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Head(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.logits(x)


def test_objectives_evaluate_averages_and_copies_take_it():
    model = logits_of(network(), "logits")
    loss, _ = objectives.rpat(model, (x,), labels, attack)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    average = ema_update(snapshot(model), model, decay=0.5)
    with frozen(model) as f:
        assert_close(call_with(f, average, x), model.model.logits(x))
    assert 0 <= evaluate(model, [(x, labels)], {"pgd": attack}, progress=False).clean_accuracy <= 100
    model.eval()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), model(x))


@every_kind
def test_lanes_fold_the_batch_norm_inside(make, output):
    model = logits_of(network(make), output)
    with torch.no_grad(), frozen(model, lane=Lane(dtype=None)) as f:
        assert_close(f(x), model.model.eval().logits(x))
        assert f.notes == ()


def test_inner_layers_are_tapped_by_their_names():
    model = logits_of(network(), "logits").eval()
    outputs = tap(model, {"model.body": "features"})(x)
    assert torch.equal(outputs["features"], model.model.body(x))


@pytest.mark.slow
def test_it_compiles_and_prints():
    model = logits_of(network(Named), "logits").eval()
    assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
    assert "output='logits'" in repr(model)


# Clear errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "output", "kind", "says"),
    [
        (dictionary, "out", ValueError, r"no 'out'; it is a dict with the keys 'features', 'logits'"),
        (pair, 2, ValueError, r"no 2; it is a tuple of 2"),
        (pair, "logits", ValueError, r"no 'logits'; it is a tuple of 2"),
        (Named, "scores", ValueError, r"no 'scores'; it is a Named of 2, features, logits"),
        (Plain, "scores", ValueError, r"no 'scores'; it is a Plain with the attributes features, logits"),
        (lambda features, logits: {"logits": logits.argmax(1)}, "logits", TypeError, r"tensor of torch.int64"),
        (lambda features, logits: {"logits": None}, "logits", TypeError, "got NoneType"),
        (lambda features, logits: None, "logits", ValueError, "it is a NoneType"),
    ],
    ids=["key", "index", "tuple", "field", "attribute", "integers", "none", "nothing"],
)
def test_what_is_not_there_is_named(make, output, kind, says):
    with pytest.raises(kind, match=f"logits_of: .*{says}"):
        logits_of(network(make), output)(x)


def test_arguments_are_checked_at_once():
    with pytest.raises(TypeError, match=r"logits_of: `model` must be a .*Module, got function"):
        logits_of(lambda x: x, "logits")
    for wrong in (None, 1.5, True, ("a",)):
        with pytest.raises(TypeError, match="logits_of: `output` must be the name or the index"):
            logits_of(network(), wrong)
    with pytest.raises(TypeError, match="logits_of: `input_name`"):
        logits_of(network(), "logits", input_name=1)
    with pytest.raises(TypeError, match="logits_of: `fixed_inputs`"):
        logits_of(network(), "logits", fixed_inputs=[1])


# Modes, dtypes and names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_what_is_built_around_a_network_is_in_its_mode(training):
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 4)).train(training)
    for made in (whole_batches(network, 4), from_joined(network, (4,)), fold_classes(network), logits_of(network, 0)):
        assert made.training is training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_normalised_network_keeps_its_dtype(dtype):
    model = normalized(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).to(dtype), (0.5,), (0.25,))
    assert model(torch.rand(3, 1, 2, 2, dtype=dtype)).dtype == dtype


def test_a_fixed_input_may_have_any_name():
    class Named(nn.Module):
        def forward(self, x, names):
            return {"logits": x * names}

    made = logits_of(Named(), "logits", fixed_inputs={"names": torch.tensor([2.0])})
    assert made(torch.ones(1, 3)).tolist() == [[2.0, 2.0, 2.0]]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: logits_of(nn.Linear(2, 2), 0, fixed_inputs={1: 2}), TypeError, "logits_of: `fixed_inputs` .* key 1"),
        (lambda: logits_of(nn.Linear(2, 2), 0, input_name="input", fixed_inputs={"input": 2}), ValueError,
         "logits_of: `fixed_inputs` gives 'input'"),
        (lambda: normalized(nn.Linear(2, 2), (0.5,), (0.0,)), ValueError, "^normalized: `std` must be positive"),
        (lambda: normalized(nn.Linear(2, 2), "a", (1.0,)), TypeError, "^normalized: `mean` must hold"),
        (lambda: with_cosine_logits(DigitsCNN(width=1), scale=0), ValueError, "^with_cosine_logits: `scale`"),
        (lambda: CosineLinear(0, 2), ValueError, "^CosineLinear: `in_features` must be at least 1"),
        (lambda: perceive_at(DigitsCNN(width=1), "third"), ValueError, "^perceive_at: `proxy` must be among"),
        (lambda: perceive_at(None, "logits"), TypeError, "^perceive_at: `model`"),
        (lambda: perception_taps(DigitsCNN(width=1), 5), TypeError, "^perception_taps: `proxies` must hold"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused_in_the_callers_words(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_zero_features_have_zero_cosines(dtype):
    layer = CosineLinear(3, 2).to(dtype)
    features = torch.zeros(2, 3, dtype=dtype).requires_grad_()
    logits = layer(features)
    logits.sum().backward()
    assert not logits.any()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("around", [fold_classes, lambda model: whole_batches(model, 4)])
def test_an_output_that_is_no_tensor_is_named(around):
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    for rows in (2, 4):
        with pytest.raises(TypeError, match=r"`model` must return a tensor, got tuple; .*logits_of"):
            around(Pair())(torch.rand(rows, 4))
