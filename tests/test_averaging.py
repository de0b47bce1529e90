"""Averaged weights as plain dicts: what goes in stays as it was, what comes out is new."""

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

from perceptual_at import call_with, ema_update, frozen, refresh_batch_norm, snapshot, swa_update
from tests.strategies import generator, normal, seeds

decays = st.one_of(st.just(0.0), st.just(1.0), st.floats(0.0, 1.0))


def net(seed=0):
    """A small model with running statistics, in float64."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(seed + i, *parameter.shape))
        model[1].running_mean.copy_(normal(seed + 50, 6))
        model[1].running_var.copy_(1 + normal(seed + 51, 6) ** 2)
        model[1].num_batches_tracked.fill_(seed + 7)
    return model


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def shares_memory(weights, model):
    own = {value.data_ptr() for value in model.state_dict().values()}
    return any(value.data_ptr() in own for value in weights.values())


# Snapshot ---------------------------------------------------------------------------------------------------------


def test_a_snapshot_is_a_copy_of_parameters_and_buffers():
    model = net()
    weights = snapshot(model)
    assert same(weights, model.state_dict())
    assert not any(value.requires_grad for value in weights.values())
    assert not shares_memory(weights, model)
    before = copy.deepcopy(weights)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(1)
    assert same(weights, before)


def test_a_snapshot_can_be_loaded_and_saved(tmp_path):
    weights = snapshot(net())
    torch.save(weights, tmp_path / "average.pt")
    other = net(seed=9)
    other.load_state_dict(torch.load(tmp_path / "average.pt", weights_only=True))
    assert same(other.state_dict(), weights)


def test_names_carry_no_prefix_of_a_wrapper(tmp_path):
    model = net()
    expected = snapshot(model)
    compiled = torch.compile(model, backend="eager")
    assert same(snapshot(compiled), expected)
    assert same(ema_update(expected, compiled, decay=0.5), expected)
    parallel = nn.DataParallel(model)
    assert same(snapshot(parallel), expected)
    assert_close(call_with(parallel.eval(), expected, normal(0, 5, 4)), model.eval()(normal(0, 5, 4)))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        for both in (wrapped, torch.compile(wrapped, backend="eager")):
            assert same(snapshot(both), expected)
            x = normal(0, 5, 4)
            assert_close(call_with(both.eval(), expected, x), model.eval()(x))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "update",
    [
        lambda model, average: snapshot(model),
        lambda model, average: snapshot(model, dtype=torch.float64),
        lambda model, average: ema_update(average, model, decay=0.5),
        lambda model, average: ema_update(average, model, decay=0.5, buffers="keep"),
        lambda model, average: swa_update(average, model, count=2),
        lambda model, average: refresh_batch_norm(model, average, [normal(1, 5, 4)]),
    ],
    ids=["snapshot", "another dtype", "ema", "ema of parameters", "swa", "refreshed"],
)
@pytest.mark.parametrize("inference", ["nothing", "the average", "the model"])
def test_averages_that_were_made_in_inference_mode_go_on_outside(update, inference):
    with torch.inference_mode(inference == "the model"):
        model = net(1)
    average = snapshot(net(2))
    expected = update(model, average)
    with torch.inference_mode():
        average = {name: value.clone() for name, value in average.items()} if inference == "the average" else average
        updated = update(model, average)
    assert not any(value.is_inference() for value in updated.values())
    assert same(updated, expected)
    trained = net(3).train()
    call_with(trained, updated, normal(0, 5, 4).requires_grad_()).sum().backward()  # moves its running statistics
    assert not torch.equal(updated["1.running_mean"], expected["1.running_mean"])
    assert same(ema_update(updated, trained, decay=0.0), trained.state_dict())


# Averaging --------------------------------------------------------------------------------------------------------


@given(seeds, decays)
def test_an_update_is_a_convex_combination(seed, decay):
    average, model = snapshot(net(seed % 1000)), net(seed % 1000 + 500)
    updated, current = ema_update(average, model, decay=decay), model.state_dict()
    for name, value in updated.items():
        assert value.dtype == current[name].dtype
        if value.is_floating_point():
            assert_close(value, decay * average[name] + (1 - decay) * current[name], rtol=1e-12, atol=1e-14)
            low, high = torch.minimum(average[name], current[name]), torch.maximum(average[name], current[name])
            assert ((value >= low) & (value <= high)).all()
        else:
            assert torch.equal(value, current[name])


def test_the_ends_of_the_decay_are_exact():
    average, model = snapshot(net(1)), net(2)
    assert same(ema_update(average, model, decay=0.0), model.state_dict())
    kept = ema_update(average, model, decay=1.0)
    assert all(torch.equal(kept[name], average[name]) for name in kept if kept[name].is_floating_point())


def test_an_update_touches_neither_the_average_nor_the_model():
    average, model = snapshot(net(1)), net(2)
    before, weights = copy.deepcopy(average), copy.deepcopy(model.state_dict())
    updated = ema_update(average, model, decay=0.5)
    assert same(average, before)
    assert same(model.state_dict(), weights)
    assert not shares_memory(updated, model)
    assert not {v.data_ptr() for v in updated.values()} & {v.data_ptr() for v in average.values()}
    assert not any(value.requires_grad for value in updated.values())


def test_many_updates_weigh_the_past_geometrically():
    models, decay = [net(seed) for seed in range(5)], 0.75
    average = snapshot(models[0])
    for model in models[1:]:
        average = ema_update(average, model, decay=decay)
    weights = [decay**4] + [(1 - decay) * decay ** (4 - i) for i in range(1, 5)]
    assert sum(weights) == pytest.approx(1)
    expected = sum(w * model[0].weight.detach() for w, model in zip(weights, models, strict=True))
    assert_close(average["0.weight"], expected)


def test_parameters_are_averaged_as_torch_does_it():
    models, decay = [net(seed) for seed in range(4)], 0.9
    ours = snapshot(models[0])
    theirs = AveragedModel(models[0], multi_avg_fn=get_ema_multi_avg_fn(decay))
    theirs.update_parameters(models[0])  # the first call copies
    for model in models[1:]:
        ours = ema_update(ours, model, decay=decay)
        theirs.update_parameters(model)
    for name, parameter in theirs.module.named_parameters():
        assert_close(ours[name], parameter.detach())


# Calls with other weights -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "hook",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
        lambda layer: prune.random_structured(layer, "weight", amount=0.3, dim=0),
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ],
    ids=["pruned", "pruned rows", "weight norm", "spectral norm"],
)
@pytest.mark.parametrize("fails", [False, True])
def test_weights_that_hooks_compute_are_the_models_own_after_a_call_with_others(hook, fails):
    model, x = net().eval(), normal(3, 5, 4)
    hook(model[0])
    model(x)
    computed, kept = model[0].weight, model[0].weight.detach().clone()
    others = {name: 2 * value if "mask" not in name else value for name, value in snapshot(model).items()}
    if fails:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            call_with(model, others, x[:, :3])
    else:
        assert not torch.equal(call_with(model, others, x), model(x))
        computed = model[0].weight
        call_with(model, others, x)
    assert model[0].weight is computed
    assert torch.equal(computed, kept)
    computed.square().sum().backward()  # such as a penalty of the weights
    own = [parameter for name, parameter in model.named_parameters() if name.startswith("0.weight")]
    assert all(parameter.grad is not None for parameter in own)


@given(seeds)
def test_a_call_with_weights_is_the_call_of_a_model_that_has_them(seed):
    model, other, x = net(1).eval(), net(2).eval(), normal(seed, 5, 4)
    assert torch.equal(call_with(model, snapshot(other), x), other(x))


def test_the_model_is_not_touched():
    model, x = net(1).train(), normal(0, 5, 4)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    call_with(model, snapshot(net(2)), x)
    assert same(model.state_dict(), before)
    assert [m.training for m in model.modules()] == modes


def test_the_model_is_not_touched_when_the_call_fails():
    model = net(1)
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    with pytest.raises(RuntimeError):
        call_with(model, snapshot(net(2)), normal(0, 5, 99))
    assert same(model.state_dict(), before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_in_eval_mode_the_averaged_statistics_are_used_and_kept():
    model, average, x = net(1), snapshot(net(2)), normal(0, 5, 4)
    before = copy.deepcopy(average)
    with frozen(model) as f:
        inside = call_with(f, average, x)
    assert torch.equal(inside, net(2).eval()(x))
    assert same(average, before)


def test_in_train_mode_the_statistics_of_the_dict_move_and_the_models_do_not():
    model, average = net(1).train(), snapshot(net(2))
    before, own = copy.deepcopy(average), copy.deepcopy(model.state_dict())
    call_with(model, average, normal(0, 5, 4))
    assert same(model.state_dict(), own)
    moved = {name for name in average if not torch.equal(average[name], before[name])}
    assert moved == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_gradients_go_to_the_weights_that_were_used():
    model, x = net(1).eval(), normal(0, 5, 4)
    weights = snapshot(net(2))
    for name, _ in model.named_parameters():
        weights[name].requires_grad_()
    call_with(model, weights, x).sum().backward()
    other = net(2).eval()
    other(x).sum().backward()
    for name, parameter in other.named_parameters():
        assert_close(weights[name].grad, parameter.grad)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_averaging_draws_nothing():
    model = net(1).eval()
    state = torch.get_rng_state()
    call_with(model, ema_update(snapshot(model), model, decay=0.5), torch.rand(2, 4, generator=generator(0)).double())
    assert torch.equal(torch.get_rng_state(), state)


# Other averages ---------------------------------------------------------------------------------------------------


def test_swa_is_the_plain_mean_of_parameters_and_leaves_buffers():
    models = [net(seed) for seed in (1, 5, 9)]
    average = snapshot(net(30))
    buffers = {name: value for name, value in average.items() if name.startswith("1.") and "running" in name}
    for count, model in enumerate(models):
        average = swa_update(average, model, count=count)
    for name, value in models[0].named_parameters():
        mean = torch.stack([model.get_parameter(name) for model in models]).mean(dim=0)
        assert_close(average[name], mean.detach(), msg=str(value.shape))
    for name, value in buffers.items():
        assert torch.equal(average[name], value)


@pytest.mark.parametrize(("buffers", "share"), [("average", 0.25), ("copy", 1.0), ("keep", 0.0)])
def test_buffers_are_averaged_copied_or_kept(buffers, share):
    average, model = snapshot(net(3)), net(8)
    updated = ema_update(average, model, decay=0.75, buffers=buffers)
    for name in ("1.running_mean", "1.running_var"):
        assert_close(updated[name], torch.lerp(average[name], model.state_dict()[name], share))
    assert_close(updated["0.weight"], torch.lerp(average["0.weight"], model[0].weight.detach(), 0.25))


def test_refreshed_statistics_are_those_of_all_images_in_one_pass():
    model = net().train()
    model[1].momentum = 0.3
    before, x = snapshot(model), normal(4, 30, 4)
    weights = snapshot(net(11))
    refreshed = refresh_batch_norm(model, weights, [(part, None) for part in x.split([12, 12, 6])])
    hidden = torch.nn.functional.linear(x, weights["0.weight"], weights["0.bias"])
    assert_close(refreshed["1.running_mean"], hidden.mean(dim=0))
    parts = [part.var(dim=0) * len(part) / 30 for part in hidden.split([12, 12, 6])]
    assert_close(refreshed["1.running_var"], torch.stack(parts).sum(dim=0))
    assert same(snapshot(model), before)
    assert model[1].momentum == 0.3
    assert model.training
    assert all(torch.equal(refreshed[name], weights[name]) for name in weights if not name.startswith("1."))


def test_without_batch_norm_nothing_is_run():
    model = nn.Linear(2, 2)
    assert same(refresh_batch_norm(model, snapshot(model), iter(())), snapshot(model))


def test_batches_without_an_image_say_nothing_of_statistics():
    model, x, nothing = nn.BatchNorm1d(2), torch.rand(6, 2), torch.zeros(0, 2)
    whole = refresh_batch_norm(model, snapshot(model), [x[:4], x[4:]])
    assert same(refresh_batch_norm(model, snapshot(model), [nothing, x[:4], nothing, x[4:]]), whole)
    with pytest.raises(ValueError, match="refresh_batch_norm: `batches` is empty"):
        refresh_batch_norm(model, snapshot(model), [nothing])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: refresh_batch_norm(m, snapshot(m), []), "refresh_batch_norm: `batches` is empty"),
        (
            lambda m: refresh_batch_norm(m, snapshot(m), [normal(0, 2, 4), normal(1, 1, 4)]),
            r"refresh_batch_norm: `batches` has one of shape \(1, 4\), .*`drop_last=True`",
        ),
        (lambda m: refresh_batch_norm(m, {}, []), "`weights` does not belong"),
        (lambda m: swa_update(snapshot(m), m, count=-1), "swa_update: `count`"),
        (lambda m: swa_update(snapshot(m), m, count=torch.ones(3)), "swa_update: `count`"),
        (lambda m: swa_update(None, m, count=1), "swa_update: `average` must be a dict"),
        (lambda m: ema_update([], m, decay=0.5), "ema_update: `average` must be a dict"),
        (lambda m: ema_update(snapshot(m), m, decay=0.5, buffers="drop"), "ema_update: `buffers`"),
    ],
)
def test_a_bad_call_of_another_average_is_refused(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call(net())


class Twice(nn.Module):
    """A block that is used twice, under two names, and an output tied to the input's embedding."""

    def __init__(self):
        super().__init__()
        self.words, self.block = nn.Embedding(7, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.again = self.block
        self.output = nn.Linear(4, 7, bias=False)
        self.output.weight = self.words.weight

    def forward(self, tokens):
        return self.output(self.again(self.block(self.words(tokens)).relu()))


def test_weights_under_two_names_are_averaged_and_called():
    torch.manual_seed(0)
    model, tokens = Twice().eval(), torch.arange(5)
    average = snapshot(model)
    assert {"again.0.weight", "block.0.weight", "output.weight", "words.weight"} <= average.keys()
    before = dict(model.named_parameters())
    assert torch.equal(call_with(model, average, tokens), model(tokens))
    assert all(after is before[name] for name, after in model.named_parameters())  # they are the model's own again
    with torch.no_grad():
        model.words.weight.add_(1.0)
        model.block[0].bias.add_(1.0)
    moved = ema_update(average, model, decay=0.5)
    expected = Twice().eval()
    expected.load_state_dict(moved)
    assert torch.equal(call_with(model, moved, tokens), expected(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_average_follows_a_sixteen_bit_model(dtype):
    torch.manual_seed(0)
    model = nn.Linear(3, 2).to(dtype)
    average = snapshot(model, dtype=torch.float32)
    assert all(value.dtype == torch.float32 for value in average.values())
    start = {name: value.clone() for name, value in average.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    for _ in range(200):
        average = ema_update(average, model, decay=0.999)
    share = 1 - 0.999**200
    for name, value in model.state_dict().items():
        torch.testing.assert_close(average[name], torch.lerp(start[name], value.float(), share), rtol=1e-4, atol=1e-5)
    x = torch.rand(4, 3).to(dtype)
    assert call_with(model, average, x).dtype == dtype


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_statistics_that_would_move_inside_a_transform_are_named(transform):
    model, x = net().train(), normal(0, 5, 4)
    weights = {name: value for name, value in snapshot(model).items() if name in dict(model.named_parameters())}
    buffers = {name: value for name, value in snapshot(model).items() if name not in weights}

    def run():
        if transform == "vmap":
            return torch.vmap(lambda one: call_with(model, weights | buffers, one))(x[None])
        return torch.func.grad(lambda w: call_with(model, w | buffers, x).sum())(weights)

    with pytest.raises(ValueError, match=r"^call_with: `model` has BatchNorm1d in train mode.*torch\.func"):
        run()
    model.eval()
    run()


# What train mode moves, whatever the dict's dtypes and names --------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_call_in_train_mode_moves_statistics_of_another_dtype(dtype):
    model, x = nn.BatchNorm1d(2, affine=False).to(dtype), torch.tensor([[0.0, 4.0], [2.0, 8.0]], dtype=dtype)
    weights = snapshot(model, dtype=torch.float32)
    call_with(model, weights, x)
    assert_close(weights["running_mean"], torch.tensor([0.1, 0.6]), rtol=1e-2, atol=0)
    assert weights["num_batches_tracked"] == 1
    assert model.running_mean.tolist() == [0.0, 0.0]


def test_a_call_in_eval_mode_leaves_weights_of_another_dtype_to_the_last_bit():
    model = nn.BatchNorm1d(2).bfloat16().eval()
    weights = {name: value + 1e-4 if value.is_floating_point() else value
               for name, value in snapshot(model, dtype=torch.float32).items()}  # fmt: skip
    before = copy.deepcopy(weights)
    call_with(model, weights, torch.rand(3, 2).bfloat16())
    assert same(weights, before)


def test_statistics_are_refreshed_in_another_dtype():
    model = nn.BatchNorm1d(1).bfloat16()
    batches = [torch.tensor([[0.0], [2.0]]).bfloat16(), torch.ones(2, 1).bfloat16() * 5]
    refreshed = refresh_batch_norm(model, snapshot(model, dtype=torch.float32), batches)
    assert refreshed["running_mean"].tolist() == [3.0]
    assert refreshed["running_mean"].dtype == torch.float32


def test_statistics_are_moved_and_refreshed_under_all_their_names():
    torch.manual_seed(0)
    model, tokens = Twice(), torch.arange(5)
    refreshed = refresh_batch_norm(model, snapshot(model), [tokens, tokens])
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(refreshed[f"again.1.{name}"], refreshed[f"block.1.{name}"])
    assert refreshed["again.1.running_mean"].any()
    loaded = Twice()
    loaded.load_state_dict(refreshed)
    assert torch.equal(loaded.block[1].running_mean, refreshed["block.1.running_mean"])


LINE = nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ema_update({"weight": None, "bias": None}, LINE, decay=0.5), TypeError, r"`average\['"),
        (lambda: swa_update(snapshot(LINE) | {"bias": [0, 0]}, LINE, count=1), TypeError, r"`average\['bias'"),
        (lambda: call_with(LINE, snapshot(nn.Linear(3, 5)), torch.rand(1, 3)), ValueError,
         r"call_with: `weights` has 'weight' of shape \(5, 3\)"),
        (lambda: refresh_batch_norm(LINE, snapshot(nn.Linear(3, 5)), []), ValueError, "`weights` has"),
        (lambda: refresh_batch_norm(LINE, snapshot(LINE), None), TypeError, "`batches` must .* NoneType"),
        (lambda: refresh_batch_norm(LINE, snapshot(LINE), torch.rand(4, 3)), TypeError, r"`batches` .*`\[x\]`"),
        (lambda: refresh_batch_norm(net(), snapshot(net()), [{"x": 1}]), TypeError, "`batches` must hold images"),
        (lambda: snapshot(nn.Sequential(nn.LazyLinear(3))), ValueError, "snapshot: .*'0.weight' is not init"),
        (lambda: ema_update({}, nn.LazyLinear(3), decay=0.5), ValueError, "ema_update: .*'weight' is not init"),
    ],
)  # fmt: skip
def test_weights_that_are_none_of_this_model_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_scripted_model_is_refused_in_the_name_of_what_was_called():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in newer versions
        scripted, traced = torch.jit.script(model), torch.jit.trace(model, torch.rand(1, 4))
    for found in (scripted, traced):
        with pytest.raises(TypeError, match=r"^call_with: a scripted `model` runs with its own weights alone"):
            call_with(found, snapshot(model), torch.rand(2, 4))
