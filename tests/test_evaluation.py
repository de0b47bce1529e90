"""Evaluation by models whose verdicts are known by hand."""

import dataclasses
import functools
import json
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from perceptual_at import (
    L1,
    L2,
    Evaluation,
    Linf,
    SampleGenerator,
    apgd,
    compare,
    evaluate,
    fab,
    kl_to,
    mean_score,
    nrr,
    pgd,
    sanity_checks,
    square,
    wilson_interval,
)
from perceptual_at.attacks.autoattack import auto_attack
from perceptual_at.attacks.verdict import Verdict
from perceptual_at.evaluation import Check
from perceptual_at.plotting import accuracy_bars
from tests.strategies import clean_inputs, integers
from tests.tiny import Shelf

quiet = partial(evaluate, progress=False)


def threshold(x):
    """Class 0 above one half."""
    return torch.cat([x, 1 - x], dim=1)


def push(distance):
    """An attack on the threshold: a fixed distance towards the other class."""

    def attack(model, x, labels):
        return x - distance * (1 - 2 * labels[:, None].to(x.dtype))

    return attack


X = torch.tensor([[0.9], [0.6], [0.52], [0.4], [0.1], [0.45]])
LABELS = torch.tensor([0, 0, 0, 0, 1, 1])
RIGHT = [True, True, True, False, True, True]
LOADER = [(X[:4], LABELS[:4]), (X[4:], LABELS[4:])]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.dropout, self.last = (
            nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4)
        )  # fmt: skip
        self.calls = []

    def forward(self, x):
        self.calls.append((self.training, len(x), torch.is_grad_enabled()))
        return self.last(self.dropout(self.norm(self.first(x.flatten(1)))))


# Verdicts ---------------------------------------------------------------------------------------------------------


def test_verdicts_are_those_of_the_hand():
    result = quiet(threshold, LOADER, {"near": push(0.05), "far": push(0.2), "nothing": push(0.0)})
    assert result.correct.tolist() == RIGHT
    assert result.robust["nothing"].tolist() == RIGHT
    assert result.robust["near"].tolist() == [True, True, False, False, True, False]
    assert result.robust["far"].tolist() == [True, False, False, False, True, False]
    assert result.clean_accuracy == pytest.approx(5 / 6)
    assert result.robust_accuracy == pytest.approx({"near": 3 / 6, "far": 2 / 6, "nothing": 5 / 6})
    assert len(result) == 6


def test_the_worst_case_is_taken_per_sample_not_per_attack():
    def only_class(label):
        return lambda model, x, labels: torch.where((labels == label)[:, None], push(0.2)(model, x, labels), x)

    result = quiet(threshold, LOADER, {"zeros": only_class(0), "ones": only_class(1)})
    assert result.robust_accuracy == pytest.approx({"zeros": 3 / 6, "ones": 4 / 6})
    assert result.worst_case == pytest.approx(2 / 6)  # below each


def test_the_summaries_are_of_clean_and_worst_case():
    result = quiet(threshold, LOADER, {"near": push(0.05), "far": push(0.2)})
    assert result.mean == mean_score(result.clean_accuracy, result.worst_case)
    assert result.nrr == nrr(result.clean_accuracy, result.worst_case)
    assert result.nrr == pytest.approx(2 * (5 / 6) * (2 / 6) / (7 / 6))


def test_without_attacks_there_is_clean_accuracy_alone():
    result = quiet(threshold, LOADER, {})
    assert result.robust_accuracy == {}
    assert result.worst_case == result.clean_accuracy == pytest.approx(5 / 6)


def test_an_attack_that_helps_saves_no_wrong_sample():
    result = quiet(threshold, LOADER, {"help": push(-0.3)})
    assert result.robust["help"].tolist() == RIGHT


def test_verdicts_do_not_depend_on_how_the_data_are_batched():
    whole = quiet(threshold, [(X, LABELS)], {"near": push(0.05)})
    for size in (1, 2, 4):
        parts = quiet(threshold, DataLoader(TensorDataset(X, LABELS), batch_size=size), {"near": push(0.05)})
        assert torch.equal(parts.correct, whole.correct)
        assert torch.equal(parts.robust["near"], whole.robust["near"])


def test_a_model_that_is_always_right_or_always_wrong():
    always = quiet(lambda x: torch.tensor([[1.0, 0.0]]).expand(len(x), 2), [(X, LABELS * 0)], {"far": push(0.2)})
    assert (always.clean_accuracy, always.worst_case, always.nrr) == (1.0, 1.0, 1.0)
    never = quiet(lambda x: torch.tensor([[1.0, 0.0]]).expand(len(x), 2), [(X, LABELS * 0 + 1)], {"far": push(0.2)})
    assert (never.clean_accuracy, never.worst_case, never.mean, never.nrr) == (0.0, 0.0, 0.0, 0.0)


def test_an_empty_last_batch_does_no_harm():
    result = quiet(threshold, [*LOADER, (X[:0], LABELS[:0])], {"near": push(0.05)})
    assert len(result) == 6


# Who is attacked, and how the model is treated --------------------------------------------------------------------


def test_only_samples_that_are_right_are_attacked():
    seen = []

    def spy(model, x, labels):
        seen.extend(x.flatten().tolist())
        return x

    quiet(threshold, LOADER, {"spy": spy})
    assert seen == X[torch.tensor(RIGHT)].flatten().tolist()


def test_a_batch_with_nobody_right_is_not_attacked():
    def refuse(model, x, labels):
        raise AssertionError("called")

    result = quiet(threshold, [(X[:3], LABELS[:3] + 1)], {"refuse": refuse})
    assert result.clean_accuracy == 0.0
    assert result.robust["refuse"].tolist() == [False] * 3


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5)], ids=repr)
def test_the_model_is_left_as_found_and_judged_in_eval_mode(threat):
    model = Net().train()
    model.norm.eval()
    model.last.weight.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    x, labels = clean_inputs(0, (20, 3, 2, 2), (0.0, 1.0), torch.float32), integers(0, 20, below=4)
    evaluate(model, [(x[:8], labels[:8]), (x[8:], labels[8:])], {"pgd": partial(pgd, threat=threat)}, progress=False)
    assert not any(training for training, *_ in model.calls)
    assert [module.training for module in model.modules()] == modes
    assert not model.last.weight.requires_grad
    assert model.first.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_clean_passes_need_no_gradient_and_are_one_per_batch_after_a_second_look_at_the_first():
    model = Net()
    x, labels = clean_inputs(0, (20, 3, 2, 2), (0.0, 1.0), torch.float32), integers(0, 20, below=4)
    quiet(model, [(x[:12], labels[:12]), (x[12:], labels[12:])], {})
    assert model.calls == [(False, 12, False), (False, 12, False), (False, 8, False)]


@pytest.mark.parametrize("attack", [
    partial(pgd, threat=Linf(1e-4), steps=3), partial(apgd, threat=L2(1e-4), steps=3),
    partial(auto_attack, threat=Linf(1e-4), version=[("apgd-ce", {"steps": 2}), ("apgd-t", {"steps": 2})]),
], ids=["pgd", "apgd", "auto_attack"])  # fmt: skip
def test_an_attack_costs_its_own_passes_and_one_to_judge_by(attack):
    """Gradients of survivors are those the attack began with; nothing is asked for them a second time."""
    torch.manual_seed(0)
    model = Net().eval()
    x = clean_inputs(0, (20, 3, 2, 2), (0.0, 1.0), torch.float32)
    labels = model(x).argmax(dim=1)
    model.calls.clear()
    attack(model, x, labels, generator=torch.Generator().manual_seed(0))
    alone = sum(n for _, n, _ in model.calls)
    model.calls.clear()
    result = quiet(model, [(x, labels)], {"attack": attack})
    assert result.robust["attack"].all()  # so all of them are looked at
    assert sum(n for _, n, _ in model.calls) == alone + 2 * 20 + 20  # two clean looks, one verdict


def test_survivors_are_looked_at_where_no_attack_of_ours_asked_for_a_gradient_or_the_one_asked_for_was_flat():
    torch.manual_seed(0)
    model = Net().eval()
    x = clean_inputs(0, (20, 3, 2, 2), (0.0, 1.0), torch.float32)
    labels = model(x).argmax(dim=1)

    def gradients(attack, of):
        model.calls.clear()
        assert quiet(of, [(x, labels)], {"attack": attack}).robust["attack"].all()
        return [n for _, n, graded in model.calls if graded]

    assert gradients(lambda model, x, labels: x + 1e-5, model) == [20]
    assert gradients(partial(pgd, threat=Linf(1e-4), steps=2), model) == [20, 20]
    assert gradients(partial(pgd, threat=Linf(1e-4), steps=2), lambda x: 1e9 * model(x)) == [20, 20, 20]


def test_the_model_is_left_as_found_when_an_attack_raises():
    model = Net().train()

    def stumble(model, x, labels):
        raise RuntimeError("stumbled")

    x = clean_inputs(0, (20, 3, 2, 2), (0.0, 1.0), torch.float32)
    labels = model.eval()(x).argmax(dim=1)
    model.train()
    with pytest.raises(RuntimeError, match="stumbled"):
        quiet(model, [(x, labels)], {"stumble": stumble})
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_evaluation_works_in_inference_mode():
    model, x = Net(), clean_inputs(0, (20, 3, 2, 2), (0.0, 1.0), torch.float32)
    labels = integers(0, 20, below=4)
    with torch.inference_mode():
        inside = quiet(model, [(x, labels)], {"pgd": partial(pgd, threat=Linf(0.1), start="clean")})
    outside = quiet(model, [(x, labels)], {"pgd": partial(pgd, threat=Linf(0.1), start="clean")})
    assert torch.equal(inside.robust["pgd"], outside.robust["pgd"])


def test_inputs_go_where_they_are_told():
    seen = []

    def model(x):
        seen.append(x.device.type)
        return threshold(x)

    result = quiet(model, LOADER, {}, device="cpu")
    assert set(seen) == {"cpu"}
    assert result.correct.device.type == "cpu"


def test_a_real_attack_finds_what_the_hand_finds():
    result = quiet(threshold, LOADER, {"pgd": partial(pgd, threat=Linf(0.06), steps=3)})
    assert result.robust["pgd"].tolist() == [True, True, False, False, True, False]


# Noise, indices, verdicts -------------------------------------------------------------------------------------------


class Smooth(nn.Module):
    """In float64, where batches of another size round to the same verdicts."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.last = (
            torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((12, 20), (20, 4))
        )

    def forward(self, x):
        return torch.tanh(x.flatten(1) @ self.first) @ self.last


def noisy_samples(n=60):
    x = clean_inputs(3, (n, 3, 2, 2), (0.0, 1.0), torch.float64)
    return x, Smooth()(x).argmax(dim=1)


RANDOM_STARTS = {name: partial(pgd, threat=Linf(0.08), steps=1, step_size=0.01) for name in ("one", "two")}


def cut(size, order=None):
    x, labels = noisy_samples()
    order = torch.arange(len(x)) if order is None else order
    return [(x[rows], labels[rows], rows) for rows in order.split(size)]


def test_noise_belongs_to_the_sample_whatever_the_batches_order_and_share():
    whole = quiet(Smooth(), [noisy_samples()], RANDOM_STARTS)
    assert not torch.equal(whole.robust["one"], whole.robust["two"])  # each attack has its own
    assert 0.1 < whole.worst_case < 0.9
    for size in (1, 7):
        parts = quiet(Smooth(), cut(size), RANDOM_STARTS)
        assert all(torch.equal(parts.robust[name], whole.robust[name]) for name in RANDOM_STARTS)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    shuffled = quiet(Smooth(), cut(9, order), RANDOM_STARTS)
    assert torch.equal(shuffled.index, order)
    assert torch.equal(shuffled.robust["two"], whole.robust["two"][order])
    assert shuffled.provenance["data"] == whole.provenance["data"]
    half = quiet(Smooth(), cut(9, order[30:]), RANDOM_STARTS)  # what another process would do
    assert torch.equal(half.robust["two"], shuffled.robust["two"][30:])


def test_another_seed_draws_other_noise_and_the_same_seed_the_same():
    first, same, other = (quiet(Smooth(), [noisy_samples()], RANDOM_STARTS, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.robust["one"], same.robust["one"])
    assert not torch.equal(first.robust["one"], other.robust["one"])


def test_a_generator_goes_only_to_attacks_that_want_one():
    given = {}

    def bare(model, x, labels):
        return x

    def wants(model, x, labels, *, generator=None):
        given["wants"] = generator
        return x

    def has(model, x, labels, *, generator):
        given["has"] = generator
        return x

    def must(model, x, labels, generator):
        raise AssertionError("called")

    own = torch.Generator()
    attacks = {"bare": bare, "wants": wants, "has": partial(has, generator=own), "class": Verdictless()}
    quiet(threshold, LOADER, attacks, seed=5)
    assert given["has"] is own
    assert (given["wants"].seed, given["wants"].index.tolist()) == (5, [5])  # what did not fill a batch any more
    with pytest.raises(TypeError, match="generator"):
        quiet(threshold, LOADER, {"must": must})


class Verdictless:
    def __call__(self, model, x, labels):
        return x


def test_what_an_attack_says_of_itself_is_judged_anew():
    def boasts(model, x, labels):
        n = len(x)
        return Verdict(x, torch.ones(n, dtype=torch.bool), torch.zeros(n), torch.full((n,), 3), torch.full((n,), 4))

    result = quiet(threshold, LOADER, {"boasts": boasts})
    assert result.robust["boasts"].tolist() == RIGHT
    assert any("5 successes it reported are none for the model" in text for text in result.warnings)
    assert (result.costs["boasts"].gradients, result.costs["boasts"].forwards) == (15, 20)


def test_costs_are_those_of_the_verdict_and_clean_mistakes_cost_nothing():
    attacks = {"pgd": partial(pgd, threat=Linf(0.06), steps=3, verdict=True), "plain": partial(pgd, threat=Linf(0.06))}
    result = quiet(threshold, LOADER, attacks)
    assert (result.costs["pgd"].gradients, result.costs["pgd"].forwards) == (3 * sum(RIGHT), 4 * sum(RIGHT))
    assert (result.costs["plain"].gradients, result.costs["plain"].forwards) == (None, None)
    assert result.costs["pgd"].seconds > 0


@pytest.mark.slow
def test_warnings_and_protocol_of_an_ensemble_are_in_the_report():
    attack = partial(auto_attack, threat=Linf(0.06), version=["apgd-ce", "fab"], verdict=True)
    result = quiet(threshold, LOADER, {"aa": attack})
    assert result.attacks["aa"]["protocol"]["name"] == "custom: apgd-ce + fab, Linf(eps=0.06)"
    assert sum(result.attacks["aa"]["broken_by"].values()) == int((result.correct & ~result.robust["aa"]).sum()) > 0
    assert any(text.startswith("aa: the model seems to return probabilities") for text in result.warnings)
    assert "protocol custom: apgd-ce + fab" in result.to_markdown()


def test_in_cascade_broken_samples_leave():
    seen = []

    def spy(model, x, labels):
        seen.extend(x.flatten().tolist())
        return push(0.2)(model, x, labels)

    attacks = {"near": push(0.05), "far": spy}
    result, each = quiet(threshold, LOADER, attacks, cascade=True), quiet(threshold, LOADER, attacks)
    assert seen[:3] == pytest.approx([0.9, 0.6, 0.1])  # 0.52 and 0.45 are broken by then, 0.4 was never right
    assert result.worst_case == each.worst_case == result.robust_accuracy["far"]
    assert "In cascade" in result.to_markdown()
    assert "In cascade" not in each.to_markdown()

    def helps_nobody(model, x, labels):
        return x

    order = quiet(threshold, LOADER, {"far": push(0.2), "none": helps_nobody}, cascade=True)
    assert order.robust["none"].tolist() == order.robust["far"].tolist()  # its column counts those before it


def test_the_report_says_which_point_was_judged():
    attacks = {
        "last": partial(pgd, threat=Linf(0.1)), "best": partial(pgd, threat=Linf(0.1), keep="best"), "push": push(0.1),
    }  # fmt: skip
    text = quiet(threshold, LOADER, attacks).to_markdown()
    assert "(last: final iterate, best: any iterate, push: returned point)" in text


# Batches, scores, what belongs to samples -----------------------------------------------------------------------------


def sizes_seen(seen):
    def spy(model, x, labels):
        seen.append(len(x))
        return push(0.05)(model, x, labels)

    return spy


def test_those_left_are_packed_into_full_batches():
    x = torch.tensor([[0.9], [0.1], [0.9], [0.1], [0.52], [0.1], [0.9], [0.9], [0.52], [0.9], [0.1], [0.9]])
    labels, first, second = torch.zeros(12, dtype=torch.long), [], []
    loader = list(zip(x.split(4), labels.split(4), strict=True))
    result = quiet(threshold, loader, {"a": sizes_seen(first), "b": sizes_seen(second)}, cascade=True)
    assert first == [4, 4]  # of 2 and 3 and 3 that are right
    assert second == [4, 2]
    assert result.robust["b"].tolist() == [True, False, True, False, False, False, True, True, False, True, False, True]


def test_batches_of_other_shapes_are_not_packed_together():
    sizes = []

    def model(x):
        return threshold(x.flatten(1).mean(dim=1, keepdim=True))

    def spy(model, x, labels):
        sizes.append(tuple(x.shape))
        return x

    loader = [(torch.full((3, 1, side, side), 0.9), torch.zeros(3, dtype=torch.long)) for side in (2, 2, 4)]
    quiet(model, loader, {"spy": spy})
    assert sizes == [(3, 1, 2, 2), (3, 1, 2, 2), (3, 1, 4, 4)]


class Counted(TorchDispatchMode):
    """How many numbers operations make; those that write into what is there return all of it, and are left out."""

    written = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._schema.is_mutable:
            return out
        self.written += sum(one.numel() for one in tree_leaves(out) if isinstance(one, torch.Tensor))
        return out


@pytest.mark.slow
@pytest.mark.parametrize("size", [5, 50])
@pytest.mark.parametrize("options", [{}, {"progress": True}, {"cascade": True}], ids=str)
def test_cost_is_linear_in_the_samples_whatever_the_batch_size(size, options, capfd):
    def cost(n):
        calls = 0

        def count(frame, event, argument):
            nonlocal calls
            calls += event == "call"

        x = torch.linspace(0, 1, n)[:, None]
        loader = list(zip(x.split(size), torch.zeros(n, dtype=torch.long).split(size), strict=True))
        with Counted() as counted:
            sys.setprofile(count)
            try:
                evaluate(threshold, loader, {"near": push(0.05), "far": push(0.2)}, **{"progress": False, **options})
            finally:
                sys.setprofile(None)
        return calls, counted.written

    small, large = cost(200), cost(1600)
    assert large[0] < 9 * small[0]
    assert large[1] < 9 * small[1]


def share_below(outputs, labels):
    """A score of a regression: 1 at no error, 0 at an error of one half."""
    return (1 - 2 * (outputs[:, 0] - labels).abs()).clamp_min(0)


def test_a_score_of_ones_own_decides_and_is_averaged():
    x, labels = torch.tensor([[0.25], [0.5], [0.75]]), torch.tensor([0.25, 0.25, 0.0])
    seen = []

    def away(model, x, labels):
        seen.extend(x.flatten().tolist())
        return x + 0.125

    result = quiet(lambda x: x, [(x, labels)], {"away": away, "none": push(0.0)}, score=share_below)
    assert seen == [0.25, 0.5]  # nothing can be taken from the third
    assert result.correct.tolist() == [1.0, 0.5, 0.0]
    assert result.robust["away"].tolist() == [0.75, 0.25, 0.0]
    assert (result.clean_accuracy, result.robust_accuracy["none"]) == (0.5, 0.5)
    assert result.worst_case == pytest.approx(1 / 3)
    assert not result.counts
    assert "mean score" in result.to_markdown()
    assert "the smaller of the one without attack" in result.to_markdown()
    low, high = result.interval("clean")
    assert 0 <= low < 0.5 < high <= 1
    assert compare(result, result)["away"].p == 1.0


def test_an_attack_that_raises_a_score_does_not_count_for_it():
    x, labels = torch.tensor([[0.5]]), torch.tensor([0.75])
    result = quiet(lambda x: x, [(x, labels)], {"closer": lambda model, x, labels: x + 0.25}, score=share_below)
    assert result.robust["closer"].tolist() == result.correct.tolist() == [0.5]


def test_outputs_of_any_kind_have_a_score():
    def model(x):
        return {"value": x, "more": (x, None)}

    def right(outputs, labels):
        return (outputs["value"][:, 0] > 0.5) == (labels == 0)

    result = quiet(model, LOADER, {"far": push(0.2)}, score=right)
    assert result.correct.tolist() == [True, True, True, False, True, True]
    assert result.correct.dtype == torch.bool
    assert result.robust["far"].tolist() == [True, False, False, False, True, False]


@dataclasses.dataclass
class Answer:
    scores: list


@pytest.mark.parametrize("wrap", [dict, Answer], ids=["nested dictionary", "dataclass"])
def test_undefined_outputs_are_found_wherever_they_are(wrap):
    def model(x):
        return wrap(scores=[torch.where(x > 0.5, x, torch.nan * x)])

    def score(outputs, labels):
        scores = outputs["scores"] if wrap is dict else outputs.scores
        return (scores[0][:, 0] > 0.0) | (labels == 1)

    with pytest.raises(ValueError, match="evaluate: the model gives NaN for 3 of 6"):
        quiet(model, [(X, LABELS)], {}, score=score)
    attack = {"down": lambda model, x, labels: x - 0.3}
    assert quiet(model, [(X[:3], LABELS[:3])], attack, score=score).robust["down"].tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int8, torch.uint32])
def test_labels_may_be_of_any_integer_dtype(dtype):
    labels = LABELS.to(dtype)
    result = quiet(threshold, [(X, labels)], {"pgd": partial(pgd, threat=Linf(0.05))})
    assert result.correct.tolist() == RIGHT
    assert sanity_checks(threshold, X, labels, Linf(0.05), steps=2, queries=2)


def test_a_module_that_holds_no_numbers_says_nothing_of_the_device():
    layers = [nn.Linear(1, 2) for _ in range(2)]
    weights, buffers = torch.func.stack_module_state(layers)
    base = nn.Linear(1, 2, device="meta")

    def ensemble(x):
        def call(*state):
            return torch.func.functional_call(base, state, (x,))

        return torch.func.vmap(call)(weights, buffers).mean(dim=0)

    result = quiet(ensemble, LOADER, {"pgd": partial(pgd, threat=Linf(0.05))})
    assert torch.equal(result.correct, quiet(lambda x: sum(layer(x) for layer in layers), LOADER, {}).correct)


def test_dense_labels_are_scored_by_the_share_of_right_places():
    x = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    labels = (x[:, 0] < 0.5).long()
    labels[0, 0, :] = 1 - labels[0, 0, :]
    labels[1, 0, :] = -100

    def flipped(model, x, labels):
        return torch.cat([x[:, :, :2], 1 - x[:, :, 2:]], dim=2)

    result = quiet(lambda x: torch.cat([x, 1 - x], dim=1), [(x, labels)], {"flipped": flipped})
    assert result.correct.tolist() == pytest.approx([6 / 9, 1.0, 1.0, 1.0])
    assert result.robust["flipped"].tolist() == pytest.approx([3 / 9, 3 / 6, 6 / 9, 6 / 9])
    assert result.labels is None


def test_scores_that_are_none_are_refused():
    x, labels = torch.tensor([[0.5]]), torch.tensor([0.75])
    for score, words in (
        (lambda outputs, labels: 2 * outputs[:, 0] + 1, r"must lie in \[0, 1\], got values from 2 to 2"),
        (lambda outputs, labels: outputs, r"shape \(1,\), got shape \(1, 1\)"),
        (lambda outputs, labels: 0.5, "got float"),
        (3, "`score` must be a function"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            quiet(lambda x: x, [(x, labels)], {}, score=score)
    with pytest.raises(ValueError, match="gives NaN for 1 of 1"):
        quiet(lambda x: x, [(x, labels)], {}, score=lambda outputs, labels: outputs[:, 0] * torch.nan)


def test_what_belongs_to_samples_goes_with_them():
    index, seen = torch.tensor([5, 3, 1, 0, 2, 4]), []
    eps = torch.tensor([0.0, 0.03, 0.3, 0.15, 0.02, 0.45]) + 1e-3  # of samples 0, 1, ...

    def told(model, x, labels, *, index=None):
        seen.extend(index.tolist())
        return x

    loader = [(X[:4], LABELS[:4], index[:4]), (X[4:], LABELS[4:], index[4:])]
    attacks = {"pgd": partial(pgd, threat=Linf(eps), steps=3, start="clean"), "told": told}
    result = quiet(threshold, loader, attacks)
    # Distances to 1/2: 0.4 of sample 5, 0.1 of 3, 0.02 of 1; sample 0 is wrong; 0.4 of 2, 0.05 of 4.
    assert result.robust["pgd"].tolist() == [False, False, False, False, True, True]
    assert seen == [5, 3, 1, 2, 4]
    with pytest.raises(ValueError, match="`threat` of attack 'pgd' has one entry per sample, and none for sample 5"):
        quiet(threshold, loader, {"pgd": partial(pgd, threat=Linf(eps[:5]), steps=3)})


def test_targets_of_samples_go_with_them():
    def model(x):
        return torch.cat([x, 1 - x, 0 * x - 9], dim=1)  # the third class is out of reach

    x, labels, targets = torch.full((4, 1), 0.6), torch.tensor([0, 1, 0, 0]), torch.tensor([1, 0, 2, 1])
    attack = partial(pgd, threat=Linf(0.2), steps=5, step_size=0.03, targets=targets, start="clean")
    result = quiet(model, list(zip(x.split(2), labels.split(2), strict=True)), {"pgd": attack})
    assert result.correct.tolist() == [True, False, True, True]
    assert result.robust["pgd"].tolist() == [False, False, True, False]


# Samples that resist for the wrong reason -----------------------------------------------------------------------------


def test_samples_that_come_back_as_they_were_are_said():
    def lazy(model, x, labels):
        return torch.where(x > 0.55, x, x - 0.2)

    result = quiet(threshold, LOADER, {"lazy": lazy})
    assert any(text == "lazy: 2 of 5 samples came back as they were; the attack found no direction for them"
               for text in result.warnings)  # fmt: skip
    assert result.suspicious["not moved"].tolist() == [True, True, False, False, False, False]
    assert "not moved 2" in result.to_markdown()


def test_what_an_attack_could_not_break_may_come_back_as_it_was_where_that_is_its_rule():
    result = quiet(threshold, LOADER, {"aa": partial(auto_attack, threat=Linf(0.06), version=["apgd-ce"])})
    assert result.worst_case == pytest.approx(3 / 6)
    assert not any("came back" in text for text in result.warnings)
    assert int(result.suspicious["not moved"].sum()) == 0


OWN_THREATS = {
    "linf": Linf(0.1), "l2": L2(0.1), "l1": L1(0.1), "other bounds": Linf(0.1, bounds=(-1, 2)), "own": Shelf(0.1)
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("threat", OWN_THREATS.values(), ids=OWN_THREATS)
def test_inputs_beyond_an_attacks_own_threat_are_counted(threat, dtype):
    def own(model, x, labels, threat=threat):
        return x - torch.where(x > 0.55, 0.2, 0.05).to(x.dtype)  # of the five that are right 0.9 and 0.6 go too far

    result = quiet(threshold, [(X.to(dtype), LABELS)], {"own": own})
    assert "own: 2 of 5 inputs that it returned are outside of its threat and judged as they are" in result.warnings
    assert result.attacks["own"]["outside"] == 2
    assert result.robust["own"].tolist()[:2] == [True, False]


def test_a_budget_per_sample_is_each_samples_own():
    attack = partial(lambda model, x, labels, threat: x - 0.1, threat=Linf(torch.tensor([0.1, 0.05, 0.2, 0.1, 0.1, 0])))
    result = quiet(threshold, LOADER, {"own": attack})
    assert result.attacks["own"]["outside"] == 2  # the second and the last; the fourth is wrong without attack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_roundings_of_a_foreign_attack_are_not_outside(dtype):
    torch.manual_seed(0)
    x = torch.rand(64, 192).to(dtype)
    labels = threshold(x).argmax(1)

    def own(model, x, labels, threat):
        away = torch.randn(x.shape).to(x.dtype)
        if isinstance(threat, Linf):
            return (x + threat.eps * away.sign()).clamp(0, 1)
        return x + away * (threat.eps / away.norm(dim=1, keepdim=True))

    attacks = {"linf": partial(own, threat=Linf(8 / 255)), "l2": partial(own, threat=L2(0.5, bounds=(-9, 9)))}
    result = quiet(threshold, [(x, labels)], attacks)
    assert not any("outside" in text for text in result.warnings)


def test_a_perturbation_in_place_of_inputs_is_said():
    def only_the_perturbation(model, x, labels):
        return -0.05 * (1 - 2 * labels[:, None].to(x.dtype))

    result = quiet(threshold, LOADER, {"own": only_the_perturbation})
    assert any(
        text.startswith("own: 3 of 5 inputs that it returned are outside of [0, 1], where all clean ones are")
        for text in result.warnings
    )
    other = quiet(threshold, [(X - 0.5, (X < 1).flatten().long())], {"own": only_the_perturbation})
    assert not any("outside" in text for text in other.warnings)  # inputs that are no images have no such bounds


def test_the_report_says_how_far_inputs_were_moved(tmp_path):
    def own(model, x, labels):
        return x - torch.tensor([0.3, 0.4])

    x = torch.tensor([[1.0, 0.5], [0.75, 0.5]])
    loader, record = [(x[:1], torch.tensor([0])), (x[1:], torch.tensor([0]))], tmp_path / "record.jsonl"
    found = [quiet(lambda x: x, loader, {"own": own}, record=record) for _ in range(2)]  # the second reads the record
    for result in (*found, quiet(lambda x: x, loader, {"own": own})):
        assert result.attacks["own"]["farthest"] == pytest.approx({"Linf": 0.4, "L2": 0.5})
        assert "moved inputs by up to Linf 0.4, L2 0.5." in result.to_markdown()


def test_survivors_without_a_gradient_are_suspicious_unless_nothing_in_the_ball_lowers_their_lead():
    def steps(x):
        return threshold((4 * x).round() / 4)

    x, labels = torch.tensor([[0.9], [0.63], [0.62], [0.1]]), torch.tensor([0, 0, 0, 1])
    result = quiet(steps, [(x, labels)], {"pgd": partial(pgd, threat=Linf(0.05), steps=2)})
    assert result.robust["pgd"].all()
    # 0.85 and 0.58 are nearer to the threshold than 0.9 and 0.63 are, but 0.62 is as near as it gets
    assert result.suspicious["zero gradient"].tolist() == [True, True, False, True]
    tight = quiet(steps, [(x, labels)], {"pgd": partial(pgd, threat=Linf(0.01), steps=2)})
    assert tight.suspicious["zero gradient"].tolist() == [False, True, False, False]  # 0.9 and 0.1 stay 1 and 0
    assert tight.suspicion_rate == pytest.approx(2 / 4)  # 0.62 is a tie
    honest = quiet(threshold, LOADER, {"pgd": partial(pgd, threat=Linf(0.06), steps=2)})
    assert not any(bool(mask.any()) for mask in honest.suspicious.values())
    assert honest.suspicion_rate == 0.0


def test_ties_are_suspicious():
    result = quiet(lambda x: threshold(x) + 1e9, LOADER, {"far": push(0.4)})
    assert result.robust["far"].tolist() == [True, True, True, True, False, False]  # the first class wins every tie
    assert result.suspicious["tie"].tolist() == [True, True, True, True, False, False]


def test_looking_at_survivors_ends_and_changes_nothing():
    class NoGradient(nn.Module):
        def forward(self, x):
            if torch.is_grad_enabled():
                raise RuntimeError("only for inference")
            return threshold(x)

    result = quiet(NoGradient(), LOADER, {"near": push(0.05)})
    assert result.robust["near"].tolist() == [True, True, False, False, True, False]
    (warning,) = [text for text in result.warnings if "looked at" in text]
    assert "RuntimeError: only for inference" in warning


# Random models ------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Right at 0.9, wrong at 0.1, and a coin in between."""

    def forward(self, x):
        sure = (x - 0.5).abs() > 0.3
        coin = torch.rand_like(x).round()
        z = torch.where(sure, (x > 0.5).float(), coin)
        return torch.cat([5 * z, 5 - 5 * z], dim=1)


def test_a_random_model_is_found_and_judged_again():
    x, labels = torch.tensor([[0.9], [0.55], [0.1]] * 20), torch.zeros(60, dtype=torch.long)
    torch.manual_seed(0)
    once = quiet(Noisy(), [(x, labels)], {"none": push(0.0)})
    assert any("random" in text and "use `repeats`" in text for text in once.warnings)
    result = quiet(Noisy(), [(x, labels)], {"none": push(0.0), "half": push(0.35)}, repeats=12)
    assert result.repeated["clean"].shape == (12, 60)
    assert torch.equal(result.correct, result.repeated["clean"].all(dim=0))
    assert result.clean_accuracy == pytest.approx(1 / 3, abs=0.02)  # the coins fail once in twelve
    assert result.mean_over_repeats()["clean"] == pytest.approx(1 / 2, abs=0.05)
    assert result.mean_over_repeats()["none"] == pytest.approx(1 / 3 + 1 / 12, abs=0.05)  # right twice
    assert result.robust_accuracy["half"] == 0.0
    assert "in all of 12 passes" in result.to_markdown()


def test_in_cascade_a_random_model_is_right_only_in_passes_in_which_it_was_so_before():
    x, labels = torch.full((40, 1), 0.55), torch.zeros(40, dtype=torch.long)
    torch.manual_seed(0)
    result = quiet(Noisy(), [(x, labels)], {"a": push(0.0), "b": push(0.0)}, repeats=8, cascade=True)
    clean, a, b = (result.repeated[name] for name in ("clean", "a", "b"))
    assert bool((clean >= a).all())
    assert bool((a >= b).all())
    assert result.mean_over_repeats()["b"] == pytest.approx(1 / 8, abs=0.06)


def test_a_deterministic_model_is_judged_once_whatever_the_repeats():
    model = Net()
    x, labels = clean_inputs(0, (20, 3, 2, 2), (0.0, 1.0), torch.float32), integers(0, 20, below=4)
    result = quiet(model, [(x[:12], labels[:12]), (x[12:], labels[12:])], {}, repeats=5)
    assert [size for _, size, _ in model.calls] == [12, 12, 8]
    assert result.repeated == {}


# What speaks against a number ---------------------------------------------------------------------------------------


def test_accuracy_at_chance_is_said():
    x, labels = clean_inputs(0, (200, 4), (0.0, 1.0), torch.float32), integers(0, 200, below=4)
    (warning,) = quiet(lambda x: 3 * x, [(x, labels)], {}).warnings
    assert "cannot be told from chance (25.00 %): labels or preprocessing look wrong" in warning
    assert quiet(lambda x: 3 * x, [(x, x.argmax(dim=1))], {}).warnings == ()


def test_probabilities_are_said():
    x = clean_inputs(0, (50, 4), (0.0, 1.0), torch.float32)
    (warning,) = quiet(lambda x: x.softmax(dim=1), [(x, x.argmax(dim=1))], {}).warnings
    assert "probabilities, not logits" in warning


def test_undefined_logits_are_an_error_on_clean_inputs_and_wrong_on_adversarial_ones():
    def model(x):
        return torch.where(x < 0.3, torch.nan, threshold(x))

    with pytest.raises(ValueError, match="gives NaN for 1 of 2 clean inputs"):
        quiet(model, [(X[[0, 4]], LABELS[:2])], {})
    result = quiet(model, [(X[:2], LABELS[:2])], {"far": push(0.35)})
    assert result.robust["far"].tolist() == [True, False]
    assert "far: logits with NaN at 1 adversarial inputs; counted as wrong" in result.warnings


def test_malformed_batches_and_names_are_refused():
    def noise(model, x, labels, generator=None):
        return x + torch.randn(x.shape, generator=generator)

    index = torch.arange(4)
    bad = {
        "`x` contains NaN": lambda: quiet(threshold, [(X * torch.nan, LABELS)], {}),
        "attack 'nan' returned NaN or infinite inputs for 5 samples": lambda: quiet(
            threshold, [(X, LABELS)], {"nan": lambda model, x, labels: x / 0}
        ),
        "index 2 twice, and a sample counts once: the third entry": lambda: quiet(
            threshold, [(*LOADER[0], index), (X[:1], LABELS[:1], index[2:3])], {}
        ),
        "an index twice": lambda: quiet(threshold, [(*LOADER[0], index * 0)], {}),
        "index": lambda: quiet(threshold, [(*LOADER[0], index[:2])], {}),
        r"`loader` must give pairs .* Take them out: \[\(batch\['image'\]": lambda: quiet(
            threshold, [{"image": LOADER[0][0], "label": LOADER[0][1]}], {}
        ),
        "`loader` must give pairs": lambda: quiet(threshold, [(*LOADER[0], index.float())], {}),
        "called 'clean'": lambda: quiet(threshold, LOADER, {"clean": push(0.1)}),
        "called 'worst_case'": lambda: quiet(threshold, LOADER, {"worst_case": push(0.1)}),
        "called 3: a name is a text, got int": lambda: quiet(threshold, LOADER, {3: push(0.1)}),
        "`loader` must give batches": lambda: quiet(threshold, None, {}),
        r"the index of whole numbers `\(B,\)`, got .* torch.int64 \(4, 1\)": lambda: quiet(
            threshold, [(*LOADER[0], index[:, None])], {}
        ),
        r"attack 'double' must return inputs of torch.float32, .*x_adv.to\(x.dtype\)": lambda: quiet(
            threshold, LOADER, {"double": lambda model, x, labels: x.double()}
        ),
        "attack 'noise' was given a `SampleGenerator` .* bind a torch.Generator": lambda: quiet(
            threshold, LOADER, {"noise": noise}
        ),
        "K >= 2": lambda: quiet(lambda x: x, LOADER, {}),
        "labels` must lie in": lambda: quiet(threshold, [(X, LABELS + 1)], {}),
        "`classes` must hold 2 names": lambda: quiet(threshold, LOADER, {}, classes=["one"]),
        "`classes` must be a list of names, got list of int": lambda: quiet(threshold, LOADER, {}, classes=[0, 1]),
        "`classes` must be left out with a `score`": lambda: quiet(
            threshold, LOADER, {}, classes=["one"], score=lambda outputs, labels: outputs[:, 0] > 0
        ),
        "`checks` must be left out with a `score`": lambda: quiet(
            threshold, LOADER, {"pgd": partial(pgd, threat=Linf(0.1))}, checks=True, score=lambda *_: LABELS > 0
        ),
        "`repeats` must be at least 1": lambda: quiet(threshold, LOADER, {}, repeats=0),
        "`seed` must be an integer": lambda: quiet(threshold, LOADER, {}, seed=0.5),
        "`checks` need a threat": lambda: quiet(threshold, LOADER, {"push": push(0.1)}, checks=True),
    }
    for words, call in bad.items():
        with pytest.raises((TypeError, ValueError), match=words):
            call()


def test_the_names_of_classes_are_counted_before_anything_is_attacked():
    def never(model, x, labels):
        raise AssertionError

    with pytest.raises(ValueError, match="`classes` must hold 2 names, got 1"):
        quiet(threshold, LOADER, {"never": never}, classes=["one"])
    dense = torch.rand(2, 2, 3), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="`classes` must be left out for dense outputs"):
        quiet(lambda x: x, [dense], {"never": never}, classes=["one", "two"])


def test_attacks_that_write_to_their_inputs_change_neither_the_data_nor_the_next_attack():
    def in_place(model, x, labels):
        return x.sub_(0.2 * (1 - 2 * labels[:, None]))

    def and_labels(model, x, labels):
        labels.zero_()
        return x + 0

    whole = [(X.clone(), LABELS.clone())]
    result = quiet(threshold, whole, {"far": in_place, "same": and_labels, "near": push(0.05)})
    assert torch.equal(whole[0][0], X)
    assert torch.equal(whole[0][1], LABELS)
    for name, attack in (("far", push(0.2)), ("near", push(0.05))):
        assert torch.equal(result.robust[name], quiet(threshold, LOADER, {name: attack}).robust[name])
    assert not any(text.startswith("far:") for text in result.warnings)


def test_samples_that_may_not_move_are_not_said_to_have_come_back():
    def still(model, x, labels, *, threat):
        return x

    eps = torch.tensor([0.0, 0.0, 0.1, 0.1, 0.1, 0.1])
    found = {
        name: quiet(threshold, LOADER, {"still": partial(still, threat=Linf(eps))})
        for name, eps in (("none", 0.0), ("some", eps), ("all", 0.1))
    }
    assert [int(one.suspicious["not moved"].sum()) for one in found.values()] == [0, 3, 5]
    assert not any("came back" in text for text in found["none"].warnings)


# What it prints ---------------------------------------------------------------------------------------------------


def test_the_result_prints_percentages_and_saves_fractions():
    result = quiet(threshold, LOADER, {"near": push(0.05)})
    assert str(result) == "clean 83.33, near 50.00, worst_case 50.00, mean 66.67, nrr 62.50 (%, n=6)"
    assert json.loads(json.dumps(result.to_dict())) == pytest.approx(
        {"n": 6, "clean": 5 / 6, "near": 0.5, "worst_case": 0.5, "mean": 2 / 3, "nrr": 0.625}
    )


def test_an_evaluation_can_be_made_from_verdicts():
    result = Evaluation(torch.tensor([True, True, False]), {"a": torch.tensor([True, False, False])})
    assert result.clean_accuracy == pytest.approx(2 / 3)
    assert result.worst_case == pytest.approx(1 / 3)


def test_the_progress_bar_can_be_turned_off_and_goes_to_stderr(capfd):
    quiet(threshold, LOADER, {})
    assert capfd.readouterr() == ("", "")
    pytest.importorskip("tqdm")
    evaluate(threshold, LOADER, {})
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "evaluate" in printed.err


def test_without_tqdm_there_is_no_bar_and_no_error(capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert evaluate(threshold, LOADER, {}).clean_accuracy == pytest.approx(5 / 6)
    assert capfd.readouterr() == ("", "")


class Stream(IterableDataset):
    """Samples of which nobody knows how many there are."""

    def __iter__(self):
        return zip(X, LABELS, strict=True)


class Unmeasured(list):
    def __len__(self):
        raise TypeError("a stream has no length")


class Unwilling(list):
    def __len__(self):
        raise NotImplementedError("not before the first pass")


class Numbered:
    """Batches by number, of which one past the last is empty: it has a length and never an IndexError."""

    def __len__(self):
        return 3

    def __getitem__(self, number):
        assert number <= 3, "asked on and on"
        return X[2 * number : 2 * number + 2], LABELS[2 * number : 2 * number + 2]


@pytest.mark.parametrize("progress", [False, True])
@pytest.mark.parametrize(
    "batches",
    [
        lambda: DataLoader(Stream(), batch_size=4),
        lambda: iter(DataLoader(Stream(), batch_size=4)),
        lambda: Unmeasured(LOADER),
        lambda: Unwilling(LOADER),
        lambda: Numbered(),
        lambda: iter(LOADER),
        lambda: (batch for batch in LOADER),
    ],
    ids=["stream", "its iterator", "an own loader", "no length yet", "by number", "iterator", "generator"],
)
def test_loaders_need_no_length(batches, progress):
    result = evaluate(threshold, batches(), {"near": push(0.05)}, progress=progress)
    assert result.correct.tolist() == RIGHT
    assert torch.equal(result.robust["near"], quiet(threshold, LOADER, {"near": push(0.05)}).robust["near"])


def test_a_loader_without_samples_is_refused():
    spent = iter(LOADER)
    quiet(threshold, spent, {})
    for loader in ([], [(X[:0], LABELS[:0])], spent):
        with pytest.raises(ValueError, match=r"evaluate: `loader` gave no sample; a generator .* once"):
            quiet(threshold, loader, {})


@pytest.mark.parametrize("attacks", [{}, {"pgd": partial(pgd, threat=Linf(0.1))}], ids=["clean", "attacked"])
def test_labels_that_are_no_indices_are_named_as_they_came(attacks):
    one_hot = torch.nn.functional.one_hot(LABELS, 2)
    for labels, words in {
        LABELS.float(): r"class indices of shape \(6,\), got torch.float32 of shape \(6,\); for other tasks",
        LABELS > 0: r"class indices of shape \(6,\), got torch.bool of shape \(6,\)",
        LABELS[:, None]: r"got shape \(6, 1\). `labels.squeeze\(1\)` has it",
        one_hot: r"got shape \(6, 2\). Of one-hot ones, `labels.argmax\(dim=1\)` has it",
    }.items():
        with pytest.raises((TypeError, ValueError), match=f"^evaluate: `labels` must be .*{words}"):
            quiet(threshold, [(X, labels)], attacks)


def named():
    attacks = {"near": push(0.05), "pgd": partial(pgd, threat=Linf(0.2), steps=4, verdict=True)}
    return quiet(threshold, LOADER, attacks, classes=["high", "low"])


def test_classes_are_counted_apart():
    assert named().per_class() == {
        "high": pytest.approx({"n": 4, "clean": 3 / 4, "near": 2 / 4, "pgd": 1 / 4, "worst_case": 1 / 4}),
        "low": pytest.approx({"n": 2, "clean": 1.0, "near": 1 / 2, "pgd": 1 / 2, "worst_case": 1 / 2}),
    }
    numbered = quiet(threshold, LOADER, {})
    assert list(numbered.per_class()) == ["0", "1"]
    with pytest.raises(ValueError, match="not known"):
        Evaluation(torch.tensor([True]), {}).per_class()


def test_every_accuracy_has_an_interval_that_says_how_small_the_sample_is():
    result = named()
    assert result.interval("clean") == wilson_interval(5, 6)
    assert result.interval("worst_case", confidence=0.5) == wilson_interval(2, 6, confidence=0.5)
    assert "| worst case | 33.33 | 9.68 to 70.00 |" in result.to_markdown()


def test_the_report_as_markdown_and_latex():
    result = named()
    lines = result.to_markdown().splitlines()
    assert lines[0] == "|  | accuracy, % | 95 % interval | gradients | forwards | seconds |"
    assert lines[2].startswith("| clean | 83.33 | 43.65 to 96.99 |  |  |  |")
    assert lines[4].startswith("| pgd | 33.33 | 9.68 to 70.00 | 20 | 25 | ")
    assert "| high | 4 | 75.00 | 50.00 | 25.00 | 25.00 |" in lines
    assert any(line.startswith("- Warning: clean accuracy 83.33 % on 6 samples cannot be told") for line in lines)
    assert "`pgd(threat=Linf(eps=51/255), steps=4, verdict=True)`" in result.to_markdown()
    assert result.provenance["model"] in result.to_markdown()
    table = result.to_latex()
    assert table.startswith("\\begin{tabular}{lrr}")
    assert "worst case & 33.33 & 9.68 to 70.00 \\\\" in table


@pytest.mark.slow
def test_the_report_comes_back_from_json(tmp_path):
    result = evaluate(
        threshold, LOADER, {"pgd": partial(pgd, threat=Linf(0.2), verdict=True)}, progress=False, checks=True
    )
    result.to_json(tmp_path / "deep" / "report.json")
    again = Evaluation.from_json(tmp_path / "deep" / "report.json")
    assert again.to_dict() == result.to_dict()
    assert torch.equal(again.correct, result.correct)
    assert torch.equal(again.robust["pgd"], result.robust["pgd"])
    assert again.to_markdown() == result.to_markdown()
    assert (again.costs, again.checks, again.warnings) == (result.costs, result.checks, result.warnings)
    assert again.provenance == result.provenance
    assert compare(again, result)["pgd"].p == 1.0
    content = json.loads((tmp_path / "deep" / "report.json").read_text())
    assert content["summary"] == result.to_dict()
    assert content["provenance"]["versions"]["torch"] == torch.__version__
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="was not written by"):
        Evaluation.from_json(tmp_path / "other.json")


def test_repeats_come_back_from_json_too(tmp_path):
    torch.manual_seed(0)
    x, labels = torch.full((9, 1), 0.55), torch.zeros(9, dtype=torch.long)
    result = quiet(Noisy(), [(x, labels)], {"none": push(0.0)}, repeats=3, cascade=True)
    result.to_json(tmp_path / "report.json")
    again = Evaluation.from_json(tmp_path / "report.json")
    assert torch.equal(again.repeated["none"], result.repeated["none"])
    assert again.to_markdown() == result.to_markdown()


def test_scores_and_undefined_checks_come_back_from_json_equal_and_as_other_readers_can_read_them(tmp_path):
    result = quiet(threshold, LOADER, {"near": push(0.05)}, score=lambda outputs, labels: outputs[:, 0].clamp(0, 1))
    checks = tuple(Check("one", False, value, "it was so") for value in (float("nan"), float("inf"), 0.5))
    for one in (result, dataclasses.replace(result, checks=checks)):
        one.to_json(tmp_path / "report.json")
        assert Evaluation.from_json(tmp_path / "report.json") == one
        json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)


DAMAGE = {
    "costs": {"pgd": {"hours": 1}}, "checks": [{"name": "one"}], "classes": None, "attacks": {"pgd": 3},
    "verdicts": {"clean": "01", "pgd": "1"}, "labels": [0],
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_report_is_named_by_its_path(tmp_path, name):
    path = tmp_path / "report.json"
    Evaluation(torch.tensor([True, False]), {}).to_json(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: DAMAGE[name]}))
    with pytest.raises(ValueError, match=r"^Evaluation.from_json: .*report.json' is damaged"):
        Evaluation.from_json(path)


def test_what_no_report_can_hold_is_named(tmp_path):
    right = torch.tensor([True, False])
    (tmp_path / "deep.json").write_text("[" * 100_000)
    passes = torch.ones(3, 2, dtype=torch.bool)
    calls = {
        "Evaluation: `costs": lambda: Evaluation(right, {}, costs={"pgd": 3}),
        "Evaluation: `attacks": lambda: Evaluation(right, {}, attacks={"pgd": "a call"}),
        "Evaluation: `repeated` must hold 'clean'": lambda: Evaluation(right, {"a": right}, repeated={"a": passes}),
        "Evaluation: `repeated": lambda: Evaluation(right, {}, repeated={"clean": passes.long()}),
        "Evaluation.to_json: .* JSON": lambda: Evaluation(right, {}, provenance={"a": right}).to_json(tmp_path / "a"),
        "Evaluation.to_json: `path`": lambda: Evaluation(right, {}).to_json(None),
        "Evaluation.interval: `confidence`": lambda: Evaluation(right, {}).interval("clean", confidence=95),
        "Evaluation.from_json: .* is no JSON file": lambda: Evaluation.from_json(tmp_path / "deep.json"),
    }
    for words, call in calls.items():
        with pytest.raises((TypeError, ValueError), match=f"^{words}"):
            call()


def test_an_evaluation_keeps_its_own_and_takes_no_text_for_a_list():
    labels = torch.tensor([0, 1])
    result = Evaluation(torch.tensor([True, False]), {}, labels=labels, index=labels, classes=["crane", "crane", "cat"])
    labels.zero_()
    assert (result.labels.tolist(), result.index.tolist()) == ([0, 1], [0, 1])
    assert list(result.per_class()) == ["crane (0)", "crane (1)"]  # ImageNet has two cranes
    assert result.class_name(2) == "cat"
    for name, wrong in {"warnings": "text", "classes": "ab", "checks": ["text"]}.items():
        with pytest.raises(TypeError, match=f"^Evaluation: `{name}` must"):
            Evaluation(torch.tensor([True]), {}, **{name: wrong})


@pytest.mark.slow
def test_the_report_as_a_plot():
    pytest.importorskip("matplotlib")
    ax = accuracy_bars(named())
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([100 * n / 6 for n in (5, 3, 2, 2)])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["clean", "near", "pgd", "worst case"]


def test_evaluations_with_other_attacks_are_not_drawn_together():
    pytest.importorskip("matplotlib")
    one = named()
    assert len(accuracy_bars({"a": one, "b": one}).patches) == 8
    for results, words in (({}, "is empty"), ({"a": one, "b": quiet(threshold, LOADER, {})}, "'b' has clean")):
        with pytest.raises(ValueError, match=words):
            accuracy_bars(results)


@pytest.mark.slow
def test_checks_are_run_on_the_first_samples_with_the_threat_of_an_attack():
    attacks = {"push": push(0.1), "pgd": partial(pgd, threat=Linf(0.1))}
    result = quiet(threshold, LOADER, attacks, checks=True)
    names = [check.name for check in result.checks]
    assert names[:3] == ["modes", "inputs", "normalization"]
    assert "- inputs passed: values from 0.1 to 0.9, bounds 0 to 1." in result.to_markdown()


def test_the_bar_shows_the_accuracies_so_far(capfd, monkeypatch):
    tqdm = pytest.importorskip("tqdm.auto")
    monkeypatch.setattr(tqdm, "tqdm", partial(tqdm.tqdm, mininterval=0))
    evaluate(threshold, LOADER, {"near": push(0.05)})
    assert "clean=83.33%, robust=50.00%" in capfd.readouterr().err


def test_an_attack_without_its_threat_is_refused_before_anything_runs():
    with pytest.raises(TypeError, match=r"evaluate: attack 'pgd' cannot .* 'threat'. Bind .* functools.partial\(pgd"):
        quiet(Net(), LOADER, {"pgd": pgd})


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (partial(square, threat=Linf(0.1)), "^square: `x` must be images of shape .*, got 2 dimensions"),
        (partial(auto_attack, threat=Linf(0.1)), "^auto_attack: `x` must be images .* for Square, got 2 dimensions"),
        (partial(auto_attack, threat=Linf(0.1), version=["fab", ("apgd-ce", {"rho": 7})]), "^auto_attack: `rho`"),
        (partial(pgd, threat=Linf(0.1), step_size=-1), "^pgd: `step_size`"),
        (partial(apgd, threat=Linf(0.1), from_larger_eps=True), "^apgd: `from_larger_eps`"),
        (partial(fab, threat=Linf(0.1), generator=0), "^fab: `generator`"),
        (partial(pgd, threat=Linf(0.1), lane=3), "^pgd: `lane`"),
        (partial(pgd, threat=Linf(torch.full((3,), 0.1))), "`threat` of attack 'late' has one entry per sample"),
        (partial(pgd, threat=Linf(0.1), targets=LABELS[:3]), "`targets` of attack 'late' has one entry per sample"),
        (partial(apgd, threat=Linf(0.1), loss=kl_to(threshold(X[:3]))), "`loss` of attack 'late' has one entry per s"),
    ],
)
def test_options_of_every_attack_are_looked_at_before_the_first_pass(attack, message):
    def unused(x):
        pytest.fail("a pass was made")

    with pytest.raises((TypeError, ValueError), match=message):
        quiet(unused, [(X, LABELS)], {"early": push(0.1), "late": attack})


@pytest.mark.parametrize("attack", [pgd, apgd, fab])
def test_looking_at_options_draws_nothing_and_takes_what_belongs_to_all_or_one(attack):
    given = partial(attack, threat=Linf(0.2), steps=2, restarts=2)
    drawn = torch.Generator().manual_seed(3)
    quiet(threshold, [(X[:3], LABELS[:3])], {"it": partial(given, generator=drawn)})
    state = drawn.get_state()
    drawn.manual_seed(3)
    given(threshold, X[:3], LABELS[:3], generator=drawn)
    assert torch.equal(state, drawn.get_state())
    quiet(threshold, [(X[:3], LABELS[:3])], {"it": partial(given, generator=SampleGenerator(0, torch.arange(3)))})
    quiet(threshold, [(X[:1], LABELS[:1])], {"it": partial(given, targets=1 - LABELS[:1])})

    @functools.wraps(attack)
    def wrapped(model, x, labels, **options):
        assert len(x), "asked for no samples"
        return given(model, x, labels)

    quiet(threshold, LOADER, {"it": partial(wrapped, threat=None)})
