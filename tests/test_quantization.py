"""Adversarial inputs on the lattice of image files: exactly on it, exactly inside, and as near as that allows."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from perceptual_at import L1, L2, Linf, pgd, quantize, still_adversarial
from tests.strategies import inside_box, seeds, uniform

BOXES = st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (-2.1, 2.64)])
KINDS = st.sampled_from([Linf, L2, L1])


def images(seed, *shape, levels=256, low=0.0, high=1.0, dtype=torch.float32):
    """Images as they are read from files."""
    places = torch.randint(levels, shape, generator=torch.Generator().manual_seed(seed))
    value = low + (high - low) * (places.double() / (levels - 1))
    return inside_box(value.to(dtype), low, high)


def places(values, low=0.0, high=1.0, levels=256):
    return ((values.double() - low) / (high - low) * (levels - 1)).round().long()


def inside(values, x, threat):
    """In float64, where differences of float32 numbers are exact."""
    return bool((threat.norm(values.double() - x.double()) <= threat.eps).all())


@given(seeds, KINDS, BOXES, st.sampled_from([2 / 255, 0.03, 0.2]), st.sampled_from([torch.float32, torch.float64]))
def test_the_result_is_on_the_lattice_inside_ball_and_box(seed, kind, box, eps, dtype):
    low, high = box
    width = high - low
    threat = kind(eps * width if kind is Linf else 5 * eps * width, bounds=box)
    x = images(seed, 3, 2, 4, 4, low=low, high=high, dtype=dtype)
    noise = threat.random_start(x, generator=torch.Generator().manual_seed(seed))
    q = quantize(noise, x, threat)
    assert (q.dtype, q.shape) == (x.dtype, x.shape)
    values = low + width * (torch.arange(256, dtype=torch.float64) / 255)
    assert bool(torch.isin(q, inside_box(values.to(dtype), low, high)).all())
    assert low <= float(q.min())
    assert float(q.max()) <= high
    assert inside(q, x, threat)


def test_the_values_are_those_an_image_file_gives(tmp_path):
    x = images(0, 1, 32, 32)
    threat = Linf(8 / 255)
    q = quantize(pgd_like(x, threat), x, threat)
    Image.fromarray((q * 255).round().to(torch.uint8)[0].numpy()).save(tmp_path / "q.png")
    with Image.open(tmp_path / "q.png") as file:
        read = torch.tensor(list(file.tobytes()), dtype=torch.float32).reshape(q.shape) / 255
    assert torch.equal(read, q)


def pgd_like(x, threat, seed=0):
    """Points at the edge of the ball, as attacks leave them."""
    signs = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return threat.project(x + 2 * threat.eps * signs, x)


@given(seeds, st.sampled_from([0.01, 0.03, 8.5 / 255]), BOXES)
def test_in_the_cube_it_is_the_nearest_point_of_the_lattice_inside(seed, eps, box):
    low, high = box
    threat = Linf(eps * (high - low), bounds=box)
    x = uniform(seed, 2, 9, low=low, high=high)  # anywhere, not on the lattice
    x_adv = threat.random_start(x, generator=torch.Generator().manual_seed(seed))
    lattice = (low + (high - low) * (torch.arange(256, dtype=torch.float64) / 255)).clamp(low, high)
    for one, x_one, q in zip(x_adv.flatten(), x.flatten(), quantize(x_adv, x, threat).flatten(), strict=True):
        allowed = lattice[(lattice - x_one).abs() <= threat.eps]
        assert abs(q - one) <= (allowed - one).abs().min() + 1e-12


@given(seeds, st.sampled_from([L2, L1]))
def test_in_a_ball_only_as_many_entries_as_needed_step_back(seed, kind):
    x = images(seed, 4, 30)
    threat = kind(0.2 if kind is L2 else 0.8)
    x_adv = threat.random_start(x, generator=torch.Generator().manual_seed(seed))
    x_adv = threat.project(x + 1.5 * (x_adv - x), x)
    q = quantize(x_adv, x, threat)
    nearest = (x_adv * 255).round() / 255
    back = places(nearest) - places(q)
    assert int(back.abs().max()) <= 1
    assert bool(((q - x).abs() <= (nearest - x).abs() + 1e-6).all())  # towards x, never away
    cost = (q - x_adv).abs() - (nearest - x_adv).abs()
    for row in back.abs().sum(dim=1).nonzero().flatten().tolist():  # the dearest of them was needed too
        undone, entry = q[row : row + 1].clone(), int(cost[row].masked_fill(back[row] == 0, -1).argmax())
        undone[0, entry] = nearest[row, entry]
        assert not inside(undone, x[row : row + 1], threat)


def test_in_a_ball_the_cheapest_entries_step_back():
    x = torch.tensor([[100.0, 100.0, 100.0]]) / 255
    x_adv = x + torch.tensor([[10.6, 10.9, 10.4]]) / 255
    threat = L1(31.9 / 255)  # the sum of the changes; rounded to nearest it is 11 + 11 + 10 = 32
    assert (quantize(x_adv, x, threat) * 255).round().tolist() == [[110.0, 111.0, 110.0]]
    assert (quantize(x_adv, x, L1(32.1 / 255)) * 255).round().tolist() == [[111.0, 111.0, 110.0]]


def test_in_an_l1_ball_no_other_choice_steps_back_less():
    x = images(3, 1, 6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        delta = (torch.rand(1, 6, generator=generator) - 0.5) / 20
        x_adv = (x + delta).clamp(0, 1)
        threat = L1(float((x_adv - x).double().abs().sum()))
        nearest, q = places(x_adv), places(quantize(x_adv, x, threat))
        towards = (places(x) - nearest).sign()
        fewest = min(
            sum(chosen)
            for chosen in itertools.product((0, 1), repeat=6)
            if inside((nearest + towards * torch.tensor(chosen)).float() / 255, x, threat)
        )
        assert int((nearest - q).abs().sum()) == fewest


def test_points_of_the_lattice_inside_stay_and_a_second_time_changes_nothing():
    x = images(0, 4, 3, 5, 5)
    for threat in (Linf(0.05), L2(0.5), L1(5.0)):
        assert torch.equal(quantize(x, x, threat), x)
        once = quantize(pgd_like(x, threat), x, threat)
        assert torch.equal(quantize(once, x, threat), once)


def test_the_last_step_may_be_lost_to_rounding_and_a_millionth_more_budget_brings_it_back():
    x = images(0, 1, 4000).clamp(0.1, 0.9)
    x = (x * 255).round() / 255
    threat = Linf(8 / 255)
    strict, lenient = (
        (places(quantize(pgd_like(x, threat), x, ball)) - places(x)).abs() for ball in (threat, threat.scaled(1 + 1e-6))
    )
    assert set(strict.flatten().tolist()) == {7, 8}
    assert set(lenient.flatten().tolist()) == {8}


def test_every_sample_may_have_its_own_budget():
    x = images(0, 2, 50).clamp(0.2, 0.8)
    x = (x * 255).round() / 255
    q = quantize((x + 0.1), x, Linf(torch.tensor([3.5 / 255, 9.5 / 255])))
    assert (places(q) - places(x)).amax(dim=1).tolist() == [3, 9]
    q = quantize(x + 0.1, x, L2(torch.tensor([0.1, 0.3])))
    assert [inside(q[i : i + 1], x[i : i + 1], L2(eps)) for i, eps in enumerate((0.1, 0.3))] == [True, True]


def test_other_numbers_of_levels():
    x = images(0, 2, 20, levels=17)  # the digits of scikit-learn
    q = quantize(pgd_like(x, Linf(0.15)), x, Linf(0.15), levels=17)
    assert torch.equal(q, (q * 16).round() / 16)
    assert float((q - x).abs().max()) == 2 / 16


def test_an_empty_batch_stays_empty():
    assert quantize(torch.empty(0, 3), torch.empty(0, 3), Linf(0.1)).shape == (0, 3)


def test_saved_attacks_are_lost_without_it_and_counted():
    """Class 0 above one half; the attack ends a hair below, and plain rounding moves some back over it."""

    def model(x):
        return torch.stack([x.mean(dim=1) - 0.5, 0.5 - x.mean(dim=1)], dim=1)

    x = (torch.full((4, 8), 128 / 255) + torch.arange(4)[:, None] / 255).float()
    x_adv, labels = torch.full((4, 8), 0.49999), torch.zeros(4, dtype=torch.long)
    assert still_adversarial(model, x_adv, labels).tolist() == [True] * 4
    assert still_adversarial(model, (x_adv * 255).round() / 255, labels).sum() == 4  # 127 / 255 < 1 / 2
    ball = Linf(1.5 / 255)  # reaches 127 from 128 only
    assert still_adversarial(model, quantize(x_adv, x, ball), labels).tolist() == [True, False, False, False]


def test_still_adversarial_runs_the_model_in_eval_mode_and_leaves_it():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout(0.5)).train()
    x, labels = torch.rand(5, 3), torch.zeros(5, dtype=torch.long)
    first, second = (still_adversarial(model, x, labels) for _ in range(2))
    assert torch.equal(first, second)
    assert model[1].training
    assert not still_adversarial(lambda x: torch.full((len(x), 2), torch.nan), x, labels).any()


def test_what_cannot_be_quantized_is_refused():
    x = images(0, 2, 5)
    bad = {
        "same|equal": lambda: quantize(x[:1], x, Linf(0.1)),
        "`x_adv` is torch.float64": lambda: quantize(x.double(), x, Linf(0.1)),
        "finite bounds": lambda: quantize(x, x, Linf(0.1, bounds=(-torch.inf, torch.inf))),
        "`threat` must be Linf, L2 or L1": lambda: quantize(x, x, 8 / 255),
        "cannot be told apart in torch.bfloat16": lambda: quantize(x.bfloat16(), x.bfloat16(), Linf(0.1)),
        "`levels`=1 ": lambda: quantize(x, x, Linf(0.1), levels=1),
        "NaN": lambda: quantize(x * torch.nan, x, Linf(0.1)),
        "no point of the lattice for 2 of 2": lambda: quantize(x + 0.001, x + 0.001, Linf(0.0005)),
        "no point of the lattice for 1 of 2": lambda: quantize(x[:1] + torch.tensor([[0.0], [0.002]]),
                                                               x[:1] + torch.tensor([[0.0], [0.002]]), L2(0.001)),
    }  # fmt: skip
    for words, call in bad.items():
        with pytest.raises((TypeError, ValueError), match=words):
            call()


def test_attacks_of_the_library_survive_when_there_is_room():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 4))
    x = images(0, 40, 3, 4, 4)
    labels = model(x).argmax(dim=1)
    threat = Linf(24 / 255)
    x_adv = pgd(model, x, labels, threat, keep="best")
    before, after = (still_adversarial(model, value, labels) for value in (x_adv, quantize(x_adv, x, threat)))
    assert before.sum() > 20
    assert (before & after).sum() >= 0.8 * before.sum()
