"""The networks: their published sizes, what they compute, how they are normalised and tapped."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, relu
from torch.testing import assert_close

from perceptual_at.models import (
    DigitsCNN,
    Normalize,
    ResNet,
    WideResNet,
    normalized,
    perception_taps,
    preact_resnet18,
    resnet18,
    resnet26_bottleneck,
    tap,
    vit_small,
    wide_resnet28_10,
    wide_resnet34_10,
)
from perceptual_at.models.resnets import BasicBlock, BottleneckBlock, PreActivationBlock
from perceptual_at.models.wide_resnets import WideBlock

BUILDERS = [resnet18, resnet26_bottleneck, preact_resnet18, wide_resnet28_10, wide_resnet34_10]
every_builder = pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)


def narrow(build, **sizes):
    """A version small enough for a test; wide networks widen their width tenfold."""
    return build(width=1 if "wide" in build.__name__ else 2, **sizes)


def count(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


# ---------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("build", "millions", "convolutions", "norms"),
    [
        (resnet18, 11.17, 20, 20),
        (resnet26_bottleneck, 13.96, 29, 29),
        (preact_resnet18, 11.17, 20, 17),
        (wide_resnet28_10, 36.48, 28, 25),
        (wide_resnet34_10, 46.16, 34, 31),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_published_networks_have_their_published_sizes(build, millions, convolutions, norms):
    with torch.device("meta"):
        model = build()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert round(parameters / 1e6, 2) == millions
    assert count(model, nn.Conv2d) == convolutions
    assert count(model, nn.BatchNorm2d) == norms


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (resnet18, 11_173_962),
        (resnet26_bottleneck, 13_958_986),
        (preact_resnet18, 11_172_170),
        (wide_resnet28_10, 36_479_194),
        (wide_resnet34_10, 46_160_474),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_more_classes_grow_the_last_layer_alone(build, parameters):
    with torch.device("meta"):
        ten, hundred = build(), build(100)
    features = next(layer for layer in ten.modules() if isinstance(layer, nn.Linear)).in_features
    assert sum(parameter.numel() for parameter in ten.parameters()) == parameters
    assert sum(parameter.numel() for parameter in hundred.parameters()) == parameters + 90 * (features + 1)


@every_builder
@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize(("classes", "channels"), [(2, 3), (200, 1)])
def test_every_network_takes_both_image_sizes_and_any_number_of_classes(build, side, classes, channels):
    model = narrow(build, num_classes=classes, in_channels=channels).eval()
    assert model(torch.rand(2, channels, side, side)).shape == (2, classes)


@every_builder
def test_a_stem_of_stride_two_makes_large_images_as_cheap_as_small_ones(build):
    last = "block3" if "wide" in build.__name__ else "layer4"
    small = tap(narrow(build).eval(), [last])(torch.rand(1, 3, 32, 32))[last].shape
    assert tap(narrow(build, stem_stride=2).eval(), [last])(torch.rand(1, 3, 64, 64))[last].shape == small
    assert small[2:] == ((8, 8) if "wide" in build.__name__ else (4, 4))


def test_the_digits_network_is_small_and_has_batch_norm():
    model = DigitsCNN()
    assert sum(parameter.numel() for parameter in model.parameters()) == 56_554
    assert (count(model, nn.Conv2d), count(model, nn.BatchNorm2d)) == (3, 3)
    assert DigitsCNN(width=3, num_classes=4)(torch.rand(5, 1, 8, 8)).shape == (5, 4)


# ------------------------------------------------------------------- what is computed


def fresh(block):
    """A block in float64 and eval mode, with norms that do something."""
    generator = torch.Generator().manual_seed(0)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return block.double().eval()


def norm(layer, x):
    scale = layer.weight / (layer.running_var + layer.eps).sqrt()
    return x * scale[:, None, None] + (layer.bias - layer.running_mean * scale)[:, None, None]


@pytest.mark.parametrize(("inputs", "stride"), [(4, 2), (8, 1)])
def test_a_basic_block_is_two_convolutions_and_a_shortcut_activated_last(inputs, stride):
    block, x = fresh(BasicBlock(inputs, 8, stride)), torch.rand(2, inputs, 6, 6, dtype=torch.float64) - 0.5
    inner = relu(norm(block.bn1, conv2d(x, block.conv1.weight, stride=stride, padding=1)))
    inner = norm(block.bn2, conv2d(inner, block.conv2.weight, padding=1))
    around = x
    if inputs != 8:
        around = norm(block.shortcut[1], conv2d(x, block.shortcut[0].weight, stride=stride))
    assert_close(block(x), relu(inner + around))


@pytest.mark.parametrize(("inputs", "stride"), [(4, 2), (8, 1)])
def test_a_bottleneck_strides_in_the_middle_and_is_narrow_inside(inputs, stride):
    block = fresh(BottleneckBlock(inputs, 8, stride))
    x = torch.rand(2, inputs, 6, 6, dtype=torch.float64) - 0.5
    inner = relu(norm(block.bn1, conv2d(x, block.conv1.weight)))
    inner = relu(norm(block.bn2, conv2d(inner, block.conv2.weight, stride=stride, padding=1)))
    assert inner.shape[1] == 2
    inner = norm(block.bn3, conv2d(inner, block.conv3.weight))
    around = x
    if inputs != 8:
        around = norm(block.shortcut[1], conv2d(x, block.shortcut[0].weight, stride=stride))
    assert_close(block(x), relu(inner + around))


@pytest.mark.parametrize("kind", [PreActivationBlock, WideBlock])
@pytest.mark.parametrize(("inputs", "stride"), [(4, 2), (8, 1)])
def test_a_preactivation_block_adds_its_input_untouched_unless_the_size_changes(kind, inputs, stride):
    block = fresh(kind(inputs, 8, stride, 0.0) if kind is WideBlock else kind(inputs, 8, stride))
    x = torch.rand(2, inputs, 6, 6, dtype=torch.float64) - 0.5
    active = relu(norm(block.bn1, x))
    inner = relu(norm(block.bn2, conv2d(active, block.conv1.weight, stride=stride, padding=1)))
    inner = conv2d(inner, block.conv2.weight, padding=1)
    around = x
    if inputs != 8:
        projection = block.convShortcut if kind is WideBlock else block.shortcut[0]
        around = conv2d(active, projection.weight, stride=stride)
    assert_close(block(x), inner + around)


def test_a_preactivation_network_norms_before_the_pool_and_the_others_after_the_stem():
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    model = fresh(ResNet("preactivation", (1, 1, 1, 1), width=2))
    out = conv2d(x, model.conv1.weight, padding=1)
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        out = stage(out)
    assert_close(model(x), model.linear(relu(norm(model.bn, out)).mean(dim=(2, 3))))

    model = fresh(ResNet("basic", (1, 1, 1, 1), width=2))
    out = relu(norm(model.bn1, conv2d(x, model.conv1.weight, padding=1)))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        out = stage(out)
    assert_close(model(x), model.linear(out.mean(dim=(2, 3))))


def test_a_wide_network_norms_before_the_pool():
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    model = fresh(WideResNet(10, 2, width=2))
    out = model.block3(model.block2(model.block1(conv2d(x, model.conv1.weight, padding=1))))
    assert_close(model(x), model.fc(relu(norm(model.bn1, out)).mean(dim=(2, 3))))


def test_dropout_acts_in_training_alone():
    model, x = WideResNet(10, 2, width=4, dropout=0.5), torch.rand(2, 3, 16, 16)
    assert count(model, nn.Dropout) == 3
    model.eval()
    assert_close(model(x), model(x), rtol=0, atol=0)
    for module in model.modules():
        module.training = isinstance(module, nn.Dropout)
    assert not torch.equal(model(x), model(x))
    assert count(WideResNet(10, 2, width=4), nn.Dropout) == 0


def test_wide_networks_start_from_the_normal_distribution_of_he():
    model = WideResNet(10, 4, width=16)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 4:
            fan_out = parameter.shape[0] * parameter.shape[2] * parameter.shape[3]
            assert 0.8 < parameter.std().item() / (2 / fan_out) ** 0.5 < 1.2, name
            assert parameter.abs().max() > 2.5 * parameter.std(), "a uniform start ends at 1.73 deviations"
    assert (model.fc.bias == 0).all()


@every_builder
def test_every_parameter_gets_a_gradient(build):
    model = narrow(build)
    model(torch.rand(4, 3, 32, 32)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_parameters_have_the_names_of_the_common_implementations():
    def leaves(model):
        return {name.rsplit(".", 1)[0] for name, _ in model.named_parameters()}

    blocks = {
        f"layer{stage}.{block}.{part}"
        for stage in (1, 2, 3, 4)
        for block in (0, 1)
        for part in ("conv1", "bn1", "conv2", "bn2")
    }
    projections = {f"layer{stage}.0.shortcut.{part}" for stage in (2, 3, 4) for part in (0, 1)}
    assert leaves(narrow(resnet18)) == {"conv1", "bn1", "linear"} | blocks | projections
    projections = {f"layer{stage}.0.shortcut.0" for stage in (2, 3, 4)}
    assert leaves(narrow(preact_resnet18)) == {"conv1", "bn", "linear"} | blocks | projections
    blocks = {
        f"block{stage}.layer.{block}.{part}"
        for stage in (1, 2, 3)
        for block in (0, 1, 2, 3)
        for part in ("bn1", "conv1", "bn2", "conv2")
    }
    projections = {f"block{stage}.layer.0.convShortcut" for stage in (1, 2, 3)}
    assert leaves(narrow(wide_resnet28_10)) == {"conv1", "bn1", "fc"} | blocks | projections


MODELS = [
    DigitsCNN(width=2),
    *(narrow(build) for build in BUILDERS),
    normalized(ResNet("basic", (1, 1, 1, 1), width=2), (0.4, 0.5, 0.6), (0.2, 0.2, 0.2)),
]
every_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)


def images(model, batch=3):
    channels = next(module for module in model.modules() if isinstance(module, nn.Conv2d)).in_channels
    side = 8 if channels == 1 else 16
    return torch.rand(batch, channels, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@every_model
def test_models_compile_without_a_graph_break_and_trace_to_the_same_logits(model):
    model, x = copy.deepcopy(model).eval(), images(model)
    assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
    assert_close(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DigitsCNN(width=0), "DigitsCNN: `width` must be at least 1"),
        (lambda: DigitsCNN(num_classes=1), "DigitsCNN: `num_classes` must be at least 2"),
        (lambda: resnet18(width=-1), "^resnet18: `width` must be at least 1"),
        (lambda: resnet18(in_channels=0), "^resnet18: `in_channels` must be at least 1"),
        (lambda: resnet26_bottleneck(1), "^resnet26_bottleneck: `num_classes` must be at least 2"),
        (lambda: preact_resnet18(stem_stride=0), "^preact_resnet18: `stem_stride` must be at least 1"),
        (lambda: wide_resnet28_10(width=0), "^wide_resnet28_10: `width` must be at least 1"),
        (lambda: wide_resnet34_10(in_channels=0), "^wide_resnet34_10: `in_channels` must be at least 1"),
        (lambda: vit_small(1), "^vit_small: `num_classes` must be at least 2"),
        (lambda: vit_small(width=7), "^vit_small: `width` must be a multiple of 6"),
        (lambda: vit_small(image_size=30), "^vit_small: `image_size` must be a multiple of 4"),
        (lambda: vit_small(drop_path=1.0), "^vit_small: `drop_path` must lie in"),
        (lambda: ResNet("dense", (2, 2, 2, 2)), "ResNet: `block` must be one of"),
        (lambda: ResNet("basic", (2, 2, 2)), "ResNet: `depths` must hold four numbers"),
        (lambda: ResNet("basic", (2, 2, 0, 2)), "ResNet: `depths` must be at least 1"),
        (lambda: WideResNet(30, 10), "WideResNet: `depth` must be 6 n"),
        (lambda: WideResNet(4, 10), "WideResNet: `depth` must be 6 n"),
        (lambda: WideResNet(28, 10, dropout=1.0), r"WideResNet: `dropout` must lie in \[0, 1\)"),
        (lambda: wide_resnet28_10(stem_stride=0), "^wide_resnet28_10: `stem_stride` must be at least 1"),
    ],
)
def test_sizes_that_make_no_network_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_sizes_that_are_no_integers_are_refused():
    with pytest.raises(TypeError, match="resnet18: `width` must be an integer"):
        resnet18(width=64.0)


# ---------------------------------------------------------------------- normalisation


def test_normalize_shifts_and_scales_each_channel():
    mean, std, x = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0), torch.rand(2, 3, 4, 4)
    out = Normalize(mean, std)(x)
    for channel in range(3):
        assert_close(out[:, channel], (x[:, channel] - mean[channel]) / std[channel])
    assert_close(Normalize(torch.tensor(mean), torch.tensor(std).view(3, 1, 1))(x), out)
    assert_close(Normalize(mean, std)(x[0]), out[0])


def test_normalize_keeps_its_numbers_in_the_state_dict_and_moves_with_the_model():
    layer = Normalize((1, 2), (3, 4))
    assert set(layer.state_dict()) == {"mean", "std"}
    assert not list(layer.parameters())
    assert layer.double().mean.dtype == torch.float64
    other = Normalize((0.0, 0.0), (1.0, 1.0))
    other.load_state_dict(layer.state_dict())
    assert_close(other.std.flatten(), torch.tensor([3.0, 4.0]))


def test_normalize_does_not_hold_on_to_the_numbers_it_was_given():
    mean = torch.tensor([0.5])
    layer = Normalize(mean, (1.0,))
    mean.zero_()
    assert layer.mean.item() == 0.5


def test_half_precision_images_are_normalised_in_the_precision_of_the_layer():
    x = torch.rand(1, 1, 2, 2).half()
    assert Normalize((0.5,), (0.25,))(x).dtype == torch.float32
    assert Normalize((0.5,), (0.25,)).half()(x).dtype == torch.float16


def test_images_with_another_number_of_channels_are_refused_also_by_a_traced_model():
    model = nn.Sequential(Normalize((0.1, 0.2, 0.3), (1, 1, 1)), nn.Flatten())
    for layers in (model, torch.fx.symbolic_trace(model)):
        with pytest.raises(ValueError, match=r"Normalize: `x` must be images of shape \(B, 3, H, W\)"):
            layers(torch.rand(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"got shape \(3, 8\)"):
        model(torch.rand(3, 8))


@pytest.mark.parametrize(
    ("mean", "std", "error", "message"),
    [
        ((0.5, 0.5), (0.5,), ValueError, "`mean` holds 2 channels but `std` holds 1"),
        ((0.5,), (0.0,), ValueError, "`std` must be positive and finite"),
        ((0.5,), (-0.1,), ValueError, "`std` must be positive and finite"),
        ((float("nan"),), (1.0,), ValueError, "`mean` must be finite"),
        (0.5, (1.0,), ValueError, r"`mean` must hold one number per channel, such as `\(0.5,\)`"),
        ((), (1.0,), ValueError, "`mean` must hold one number per channel"),
        ("grey", (1.0,), TypeError, "`mean` must hold one number per channel, got 'grey'"),
        ((1j,), (1.0,), TypeError, "`mean` must hold one number per channel, got torch.complex64"),
        ((True,), (1.0,), TypeError, "`mean` must hold one number per channel, got torch.bool"),
    ],
)
def test_numbers_that_cannot_normalise_are_refused(mean, std, error, message):
    with pytest.raises(error, match=f"Normalize: {message}"):
        Normalize(mean, std)


def test_a_normalized_model_is_the_given_one_behind_a_normalisation():
    inner = DigitsCNN(width=2).eval()
    model = normalized(inner, (0.3,), (0.4,))
    x = images(inner)
    assert model.model is inner
    assert_close(model(x), inner((x - 0.3) / 0.4))
    with pytest.raises(TypeError, match=r"normalized: `model` must be a torch\.nn\.Module, got function"):
        normalized(lambda x: x, (0.3,), (0.4,))


def test_normalizing_a_model_leaves_the_mode_of_each_layer():
    inner = DigitsCNN(width=2)
    inner.layer1.eval()
    model = normalized(inner, (0.3,), (0.4,))
    assert model.training
    assert inner.layer2.training
    assert not inner.layer1[1].training
    assert not normalized(inner.eval(), (0.3,), (0.4,)).training


# ---------------------------------------------------------------------------- taps


@every_model
def test_taps_read_what_hooks_see(model):
    model, x = copy.deepcopy(model).eval(), images(model)
    owner = next(module for module in model.modules() if hasattr(module, "perception_layers"))
    seen = {}
    for proxy, path in owner.perception_layers.items():
        owner.get_submodule(path).register_forward_hook(lambda *call, key=proxy: seen.update({key: call[2]}))
    logits = model(x)
    expected = dict(seen)
    outputs = perception_taps(model)(x)
    assert set(outputs) == {"logits", "second_to_last", "third_to_last"}
    for proxy, value in outputs.items():
        assert_close(value, expected[proxy], rtol=0, atol=0)
    assert_close(outputs["logits"], logits, rtol=0, atol=0)
    assert outputs["second_to_last"].ndim == 2
    assert outputs["third_to_last"].ndim == 4


def test_layers_can_be_tapped_by_name_and_renamed():
    model, x = narrow(resnet18).eval(), torch.rand(2, 3, 32, 32)
    assert set(tap(model, ["layer1", "pool"])(x)) == {"layer1", "pool"}
    outputs = tap(model, {"layer2.0.conv1": "inside"})(x)
    assert outputs["inside"].shape == (2, 4, 16, 16)


def test_a_tapped_model_shares_parameters_and_batch_norm_with_the_model():
    model, x = DigitsCNN(width=2), torch.rand(4, 1, 8, 8)
    tapped = perception_taps(model, ["logits", "second_to_last"])
    tapped(x)["second_to_last"].sum().backward()
    assert model.layer1[0].weight.grad is not None
    assert model.linear.weight.grad is None
    assert model.layer1[1].num_batches_tracked == 1
    assert {id(parameter) for parameter in tapped.parameters()} == {id(p) for p in model.parameters()}


def test_a_tapped_model_runs_with_other_weights_as_the_model_does():
    model, x = DigitsCNN(width=2).eval(), torch.rand(4, 1, 8, 8)
    average = {name: value * 0.5 for name, value in model.state_dict().items()}
    tapped = perception_taps(model, ["logits"])
    expected = torch.func.functional_call(model, average, x)
    assert_close(torch.func.functional_call(tapped, average, x)["logits"], expected)
    assert not torch.equal(expected, model(x))
    part = perception_taps(model, ["third_to_last"])  # holds the layers it needs alone
    needed = {name: average[name] for name in part.state_dict()}
    assert torch.func.functional_call(part, needed, x)["third_to_last"].shape == (4, 4, 4, 4)
    assert not any(name.startswith("layer3") for name in needed)


def test_what_lies_behind_the_last_tapped_layer_is_not_computed():
    model = DigitsCNN(width=2)
    model.linear.register_forward_hook(lambda *call: pytest.fail("the linear layer was run"))
    assert set(tap(model, ["layer2"])(torch.rand(2, 1, 8, 8))) == {"layer2"}


@pytest.mark.parametrize("training", [True, False])
def test_tapping_leaves_the_mode_of_each_layer(training):
    model = DigitsCNN(width=2).train(training)
    model.layer2[1].train(not training)  # a frozen layer, or a lone active one
    before = [module.training for module in model.modules()]
    tapped = tap(model, ["pool"])
    assert [module.training for module in model.modules()] == before
    assert tapped.training is training


def test_layers_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"tap: `layers` names 'layer9', .*'layer1', 'layer2'.*'linear'"):
        tap(DigitsCNN(width=2), ["pool", "layer9"])
    with pytest.raises(ValueError, match=r"must be among 'logits', .*, got 'embedding'"):
        perception_taps(DigitsCNN(width=2), ["embedding"])
    with pytest.raises(ValueError, match=r"perception_taps: nothing in `model` \(Sequential\) names"):
        perception_taps(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))


def test_names_given_as_one_string_and_things_that_are_no_model_are_refused():
    for call in (tap, perception_taps):
        with pytest.raises(TypeError, match="as in "):
            call(DigitsCNN(width=2), "logits")
        with pytest.raises(TypeError, match=r"at least one name|must hold names"):
            call(DigitsCNN(width=2), [])
        with pytest.raises(TypeError, match=r"`model` must be a torch\.nn\.Module, got function"):
            call(lambda x: x, ["logits"])


class Branching(nn.Module):
    """A model that cannot be traced."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else x


def test_a_model_that_cannot_be_traced_is_refused_with_its_modes_intact():
    model = Branching()
    model.linear.eval()
    with pytest.raises(ValueError, match=r"tap: torch.fx cannot trace `model` \(Branching\)"):
        tap(model, ["linear"])
    assert model.training
    assert not model.linear.training


def test_without_torchvision_taps_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models.feature_extraction", None)
    with pytest.raises(ImportError, match=r"tap: torchvision is needed .*pip install torchvision"):
        tap(DigitsCNN(width=2), ["pool"])
