"""Adversarial weight perturbation: where the weights go, what stays, and what comes back."""

import copy
import functools
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from perceptual_at import Linf, objectives, pgd, snapshot
from perceptual_at.attacks import cross_entropy
from perceptual_at.weight_perturbation import WeightPerturbation, ascend, once, restore
from tests.passes import cost
from tests.strategies import integers, uniform


def network(seed=0, norm=nn.BatchNorm1d):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), norm(8), nn.Tanh(), nn.Linear(8, 5)).double()
    return model.train()


def batch():
    return uniform(0, 6, 3, 2, 2), integers(1, 6, below=5)


def loss_of(model):
    x, labels = batch()
    return lambda: cross_entropy(model(x), labels).mean()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("parameters", ["weights", "matrices", "all"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_sam_form_leaves_every_bit_as_it_was(parameters, steps, dtype):
    model, (x, labels) = network().to(dtype), batch()
    before = snapshot(model)
    loss = lambda: cross_entropy(model(x.to(dtype)), labels).mean()  # noqa: E731
    moved = ascend(model, loss, size=0.3, steps=steps, parameters=parameters)
    assert not same(before, snapshot(model))
    restore(model, moved, form="sam")
    assert same(before, snapshot(model))


def test_each_tensor_moves_by_its_own_length_uphill():
    model = network()
    before, start = snapshot(model), loss_of(model)().item()
    moved = ascend(model, loss_of(model), size=0.01)
    assert sorted(moved.move) == ["1.weight", "4.weight"]
    for name, move in moved.move.items():
        assert_close(move.norm(), 0.01 * before[name].norm())
        assert torch.equal(model.state_dict()[name], before[name] + move)
    assert loss_of(model)().item() > start


def test_the_awp_form_keeps_the_step_taken_at_the_perturbed_point():
    model, plain = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    moved = ascend(model, loss_of(model), size=0.2)
    perturbed = snapshot(model)
    loss_of(model)().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    restore(model, moved, form="awp")
    for name, value in plain.named_parameters():
        stepped = perturbed[name] - 0.1 * (gradients[name] + 0.1 * perturbed[name])  # decay saw the perturbed weights
        expected = stepped - moved.move[name] if name in moved.move else stepped
        assert_close(model.get_parameter(name), expected)
        assert name not in moved.move or not torch.allclose(model.get_parameter(name), value)


@pytest.mark.parametrize("buffers", ["keep", "move"])
def test_running_statistics_are_kept_or_moved(buffers):
    model = network()
    before = snapshot(model)
    ascend(model, loss_of(model), buffers=buffers)
    after = snapshot(model)
    kept = all(torch.equal(after[f"2.{name}"], before[f"2.{name}"]) for name in ("running_mean", "num_batches_tracked"))
    assert kept == (buffers == "keep")


def test_what_moves_is_chosen_by_words_or_by_a_function():
    model = network()
    model[4].weight.requires_grad_(False)
    names = lambda which: sorted(ascend(network_like(model), loss_of_copy, parameters=which).move)  # noqa: E731
    holder = []

    def network_like(other):
        holder[:] = [copy.deepcopy(other)]
        return holder[0]

    def loss_of_copy():
        return loss_of(holder[0])()

    assert names("weights") == names("matrices") == ["1.weight"]
    assert names("all") == ["1.bias", "1.weight", "2.bias", "2.weight", "4.bias"]
    assert names(lambda name, value: name.startswith("4")) == ["4.bias"]


def test_no_gradient_is_written_and_a_gradient_of_zero_moves_nothing():
    model = network()
    moved = ascend(model, lambda: 0 * model[4].weight.sum() + model[1].weight[0, 0])
    assert all(p.grad is None for p in model.parameters())
    assert (moved.move["4.weight"] == 0).all()
    assert moved.move["1.weight"].count_nonzero() == 1


def test_a_loss_that_fails_leaves_the_model_as_it_was():
    model, asked = network(), []
    before = snapshot(model)

    def failing():
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return loss_of(model)()

    with pytest.raises(KeyboardInterrupt):
        ascend(model, failing, steps=2)
    assert same(before, snapshot(model))


def test_a_wrapped_or_compiled_model_is_looked_through():
    model = network()
    wrapped = torch.compile(model, backend="eager")
    moved = ascend(wrapped, loss_of(model))
    assert sorted(moved.move) == ["1.weight", "4.weight"]
    restore(wrapped, moved, form="sam")


OBJECTIVES = [
    ("pgd_at", {}, 1), ("trades", {}, 1), ("mart", {}, 1), ("consistency_at", {}, 1), ("rpat", {}, 1),
    ("rpat", {"base": "trades"}, 1), ("raat", {"mix": 0.7}, 1), ("raat_sharp", {"mix": 0.7, "average": None}, 2),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "calls"), OBJECTIVES, ids=str)
@pytest.mark.parametrize("form", ["awp", "sam"])
def test_any_objective_takes_a_step_on_one_attack(name, options, calls, form):
    model, (x, labels) = network(norm=nn.LayerNorm), batch()  # pairs in use may be as few as one
    views = (x, x.flip(3)) if name in ("consistency_at", "raat", "raat_sharp") else (x,)
    if "average" in options:
        options = {**options, "average": snapshot(model)}
    attacks = []

    def attack(*given, **more):
        attacks.append(1)
        return pgd(*given, threat=Linf(0.1), steps=2, **more)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        attacks.clear()
        objective = functools.partial(
            getattr(objectives, name), model, views, labels, once(attack, calls=calls), **options
        )
        moved = ascend(model, lambda objective=objective: objective()[0])
        loss, terms = objective()
        optimizer.zero_grad()
        loss.backward()
        if form == "sam":
            restore(model, moved, form=form)
            optimizer.step()
        else:
            optimizer.step()
            restore(model, moved, form=form)
        losses.append(loss.item())
        assert len(attacks) == calls
        assert all(value.isfinite() for value in terms.values())
    assert min(losses[1:]) < losses[0]


def test_the_ascent_costs_the_passes_of_its_loss():
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5)).double()
    x, labels = batch()
    spent = cost(lambda: ascend(model, lambda: cross_entropy(model(x), labels).mean()), batch=6)
    assert spent[:3] == (1, 0, 1)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: ascend(m, lambda: objectives.pgd_at(m, (batch()[0],), batch()[1], lambda m, x, y: x)), TypeError,
         "ascend: `loss` .* got tuple. An objective returns"),
        (lambda m: ascend(m, lambda: torch.zeros(())), ValueError, "ascend: `loss` .* without a gradient"),
        (lambda m: ascend(m, lambda: m(batch()[0])), ValueError, r"ascend: `loss` .* shape \(6, 5\)"),
        (lambda m: ascend(m, loss_of(m), size=-1.0), ValueError, "ascend: `size`"),
        (lambda m: ascend(m, loss_of(m), steps=0), ValueError, "ascend: `steps`"),
        (lambda m: ascend(m, loss_of(m), parameters="conv"), ValueError, "ascend: `parameters`"),
        (lambda m: ascend(m, loss_of(m), parameters=lambda name, value: False), ValueError, "selects no parameter"),
        (lambda m: ascend(m, loss_of(m), buffers="drop"), ValueError, "ascend: `buffers`"),
        (lambda m: ascend(loss_of(m), loss_of(m)), TypeError, "ascend: `model`"),
        (lambda m: restore(m, {}, form="sam"), TypeError, "restore: `perturbation`"),
        (lambda m: restore(m, ascend(m, loss_of(m)), form="back"), ValueError, "restore: `form`"),
        (lambda m: restore(nn.Linear(2, 2), ascend(m, loss_of(m)), form="sam"), ValueError, "restore: .*1.weight"),
        (lambda m: ascend(m, loss_of(m)()), TypeError, "ascend: `loss` must be a function .* Tensor"),
        (lambda m: once(None), TypeError, "once: `attack`"),
        (lambda m: once(lambda *_: None)(m, torch.zeros(1, 3), None), TypeError, "once: `attack` must give x_adv"),
        (lambda m: once(pgd, calls=0), ValueError, "once: `calls`"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call(network())


def test_an_attack_made_once_refuses_another_batch():
    attack = once(lambda model, x, labels: x)
    attack(None, torch.zeros(2, 3), None)
    with pytest.raises(ValueError, match=r"once: .*\(2, 3\).*\(4, 3\)"):
        attack(None, torch.zeros(4, 3), None)


def test_a_perturbation_is_two_plain_dicts(tmp_path):
    model = network()
    moved = ascend(model, loss_of(model))
    torch.save(tuple(moved), tmp_path / "moved.pt")
    again = WeightPerturbation(*torch.load(tmp_path / "moved.pt", weights_only=True))
    restore(model, again, form="sam")
    assert same(again.before, snapshot(model))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_no_weights(broken):
    model = network()
    before = snapshot(model)
    moved = ascend(model, lambda: loss_of(model)() * broken)
    assert same(snapshot(model), before)
    restore(model, moved, form="awp")
    assert same(snapshot(model), before)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-12, 1e12, 1e30])
def test_the_size_of_a_gradient_does_not_count(scale):
    wanted, model = ascend(network(), loss_of(network())), network()
    slope = {name: torch.full_like(value, 0.5) for name, value in model.named_parameters()}
    moves = []
    for factor in (1.0, scale):
        moved = ascend(model, lambda f=factor: sum((v * (f * slope[n])).sum() for n, v in model.named_parameters()))
        moves.append(moved.move)
        restore(model, moved, form="sam")
    assert wanted.move.keys() == moves[0].keys()
    for name, move in moves[0].items():
        assert move.abs().max() > 0
        torch.testing.assert_close(moves[1][name], move, rtol=1e-4, atol=0)


def test_an_attack_that_failed_is_asked_again():
    answers = iter([OSError, torch.zeros(2, 3), torch.ones(2, 3)])

    def unreliable(*_):
        answer = next(answers)
        if isinstance(answer, type):
            raise answer
        return answer

    attack, x = once(unreliable, calls=2), torch.zeros(2, 3)
    with pytest.raises(OSError):
        attack(None, x, None)
    found = [attack(None, x, None)[0, 0].item() for _ in range(4)]
    assert found == [0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_move_weights_as_dense_ones_do(kind):
    words, labels, moves = torch.tensor([[0, 1], [3, 1]]), torch.tensor([2, 4]), []
    for sparse in (False, True):
        torch.manual_seed(0)
        table = kind(6, 5, sparse=sparse)
        loss = lambda: cross_entropy(table(words).flatten(1), labels).mean()  # noqa: B023, E731
        moves.append(ascend(table, loss, size=0.1).move["weight"])
    assert_close(*moves)
