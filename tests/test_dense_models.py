"""The small U-Net and the vision transformer: shapes, modes, taps, lanes, how they are attacked and averaged."""

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from perceptual_at import Lane, Linf, call_with, ema_update, frozen, objectives, pgd, snapshot
from perceptual_at.models import UNet, VisionTransformer, normalized, perceive_at, perception_taps, vit_small
from perceptual_at.models.vision_transformers import DropPath
from tests.strategies import integers, uniform

attack = functools.partial(pgd, threat=Linf(8 / 255), steps=2)


def small(**options):
    torch.manual_seed(0)
    return VisionTransformer(3, 12, 3, num_classes=4, **{"image_size": 8, **options})


# Vision transformer -----------------------------------------------------------------------------------------------


def test_vit_small_has_the_shape_of_deit_small():
    with torch.device("meta"):
        model = vit_small()
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == 21.34
    assert len(model.blocks) == 12
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules())
    assert [block.drop_path.probability for block in model.blocks] == pytest.approx([0.1 * i / 11 for i in range(12)])


def test_attention_is_that_of_torch():
    model = small().double()
    block, tokens = model.blocks[0].attention, uniform(0, 2, 4, 12)
    reference = nn.MultiheadAttention(12, 3, batch_first=True).double()
    reference.in_proj_weight, reference.in_proj_bias = block.qkv.weight, block.qkv.bias
    reference.out_proj.weight, reference.out_proj.bias = block.output.weight, block.output.bias
    assert_close(block(tokens), reference(tokens, tokens, tokens, need_weights=False)[0], rtol=1e-12, atol=1e-12)


def test_drop_path_leaves_out_branches_of_samples_in_train_mode_alone():
    torch.manual_seed(0)
    drop, branch = DropPath(0.25), torch.ones(4000, 3, 2)
    dropped = drop(branch)
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (dropped == dropped[:, :1, :1]).all()  # a sample as a whole
    assert (dropped[:, 0, 0] == 0).float().mean() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(drop.eval()(branch), branch)
    assert torch.equal(DropPath(0.0)(branch), branch)


def test_other_image_sizes_get_their_positions_by_interpolation():
    model = small()
    x = uniform(0, 2, 3, 8, 8, dtype=torch.float32)
    assert model(uniform(0, 2, 3, 16, 12, dtype=torch.float32)).shape == (2, 4)
    nn.init.constant_(model.positions, 0.3)
    assert_close(model(torch.cat([x, x], dim=3)), model(x))  # the mean over tokens of twice the same


def test_samples_do_not_see_each_other_in_train_mode():
    model, x = small(), uniform(0, 3, 3, 8, 8, dtype=torch.float32)
    assert_close(model(x)[:1], model(x[:1]))


def test_its_taps_are_those_of_table_5_by_block():
    model, x = small().eval(), uniform(0, 2, 3, 8, 8, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision: train and eval mode differ by drop-path
        outputs = perception_taps(model)(x)
        logits, perception = perceive_at(model, "third_to_last")(x)
    assert {name: value.shape[1:] for name, value in outputs.items()} == {
        "third_to_last": (4, 12), "second_to_last": (12,), "logits": (4,),
    }  # fmt: skip
    assert_close(outputs["second_to_last"], model.pool(model.norm(model.blocks[2](outputs["third_to_last"]))))
    assert_close(logits, model(x))
    assert torch.equal(perception, outputs["third_to_last"])


class Attention(TorchDispatchMode):
    """Notes in which dtypes attention runs."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attention" in func.name():
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_a_lane_casts_attention_without_folding_and_says_so():
    model, x = small(), uniform(0, 2, 3, 8, 8, dtype=torch.float32)
    with torch.no_grad(), frozen(model, lane=Lane(dtype=torch.bfloat16)) as f:
        logits = f(x)
        with Attention() as attention:
            assert torch.equal(f(x), logits)
        assert attention.dtypes == {torch.bfloat16}
        assert f.notes == ("nothing is folded: the model has no batch norm",)
        assert_close(logits.float(), f.exact(x), rtol=0.1, atol=0.05)
    with frozen(model, lane=Lane(dtype=torch.bfloat16, fold=False)) as f:
        f(x)
        assert f.notes == ()


# Networks of torchvision ------------------------------------------------------------------------------------------


def efficient_net():
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    settings = [MBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(2, 3, 2, 8, 16, 1)]
    return EfficientNet(settings, dropout=0.1, stochastic_depth_prob=0.1, last_channel=16, num_classes=4)


def conv_next():
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=4, stochastic_depth_prob=0.1)


@pytest.mark.parametrize(
    ("network", "notes"),
    [(efficient_net, ()), (conv_next, ("nothing is folded: the model has no batch norm",))],
    ids=["EfficientNet", "ConvNeXt"],
)
def test_networks_of_torchvision_are_attacked_in_a_lane_and_trained(network, notes):
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model, x, labels = normalized(network(), (0.5,) * 3, (0.25,) * 3), uniform(0, 4, 3, 32, 32), integers(1, 4, below=4)
    x, before = x.float(), snapshot(model)
    with torch.no_grad(), frozen(model, lane=Lane(dtype=torch.bfloat16)) as f:
        assert_close(f(x).float(), f.exact(x), rtol=0.1, atol=0.05)
        assert f.notes == notes
    x_adv = attack(model, x, labels, lane=Lane())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert 0 < Linf(0.1).norm(x_adv - x).max() <= 8 / 255 + 1e-6
    loss, _ = objectives.raat(model, (x, x.flip(3)), labels, attack, mix=0.6)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# The transformer in training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rpat", "trades", "raat"])
def test_objectives_train_it_with_averaged_weights(name):
    model, x, labels = small(drop_path=0.2), uniform(0, 4, 3, 8, 8, dtype=torch.float32), integers(1, 4, below=4)
    options = {"mix": 0.6} if name == "raat" else {}
    loss, _ = getattr(objectives, name)(model, (x, x.flip(3)), labels, attack, **options)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    average = ema_update(snapshot(model), model, decay=0.9)
    with frozen(model) as f:
        assert_close(call_with(f, average, x), f(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"image_size": 30}, "`image_size`=30 must be a multiple of `patch_size`=4"),
        ({"drop_path": 1.0}, "`drop_path`"),
        ({"num_classes": 1}, "`num_classes`"),
    ],
    ids=str,
)
def test_sizes_that_do_not_divide_are_named(options, says):
    with pytest.raises(ValueError, match=f"VisionTransformer: {says}"):
        VisionTransformer(1, 12, 3, **options)
    with pytest.raises(ValueError, match="`width`=10 must be a multiple of `heads`=3"):
        VisionTransformer(1, 10, 3)


# U-Net ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 4), (9, 7), (24, 24)], ids=str)
def test_the_u_net_answers_at_every_pixel(size):
    model = UNet(width=4, num_classes=3, in_channels=2).eval()
    assert model(torch.rand(2, 2, *size)).shape == (2, 3, *size)
    assert sum(parameter.numel() for parameter in UNet(width=8, num_classes=11).parameters()) == 29_867


def test_every_pixel_is_seen_by_the_u_net_and_sees_its_neighbours():
    torch.manual_seed(0)  # in one start of twenty or so, a unit of so narrow a network is shut
    model = UNet(width=4, num_classes=3).double().eval()
    x = uniform(0, 1, 1, 16, 16).requires_grad_()
    (grad,) = torch.autograd.grad(model(x)[0, :, 8, 8].sum(), x)
    assert grad[0, 0, 8, 8] != 0
    assert (grad != 0).sum() > 100
    outputs = perception_taps(model.float())(x.detach().float())
    assert {name: value.shape[1:] for name, value in outputs.items()} == {
        "third_to_last": (8, 8, 8), "second_to_last": (4, 16, 16), "logits": (3, 16, 16),
    }  # fmt: skip


def test_the_u_net_in_a_lane_is_folded():
    model, x = UNet(width=4, num_classes=3), uniform(0, 2, 1, 8, 8, dtype=torch.float32)
    with torch.no_grad(), frozen(model, lane=Lane(dtype=None)) as f:
        assert_close(f(x), model.eval()(x), rtol=1e-4, atol=1e-5)
        assert f.notes == ()
