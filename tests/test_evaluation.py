"""Evaluation by models whose verdicts are known by hand."""

import json
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from perceptual_at import L2, Evaluation, Linf, evaluate, mean_score, nrr, pgd
from tests.strategies import clean_inputs, integers

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


def test_a_loader_without_samples_is_refused():
    for loader in ([], [(X[:0], LABELS[:0])]):
        with pytest.raises(ValueError, match="evaluate: `loader`"):
            quiet(threshold, loader, {})
