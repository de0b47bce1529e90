"""Training with generated images: who is in a batch, the decay of the average, the learning rate."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perceptual_at.data import mixed_rows
from perceptual_at.schedules import one_cycle_learning_rate, ramped_decay, triangular_learning_rate


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.floats(0, 1), st.integers(1, 9), st.integers(0, 99)
)
def test_every_batch_has_its_share_and_no_real_row_comes_twice_before_all_came(real, made, size, share, batches, seed):
    taken = size - int(share * size)
    if taken > real:
        with pytest.raises(ValueError, match="mixed_rows: `batch_size`"):
            mixed_rows(real, made, batch_size=size, fraction=share)
        return
    rows = mixed_rows(real, made, batch_size=size, fraction=share, batches=batches, generator=generator(seed))
    assert len(rows) == batches
    whole = real // taken if taken else 1  # batches that one permutation fills
    for first in range(0, batches, whole):
        seen = torch.cat([batch[0] for batch in rows[first : first + whole]])
        assert len(seen.unique()) == len(seen)
    for real_rows, made_rows in rows:
        assert (len(real_rows), len(made_rows)) == (taken, int(share * size))
        assert real_rows.dtype == made_rows.dtype == torch.int64
        assert ((real_rows >= 0) & (real_rows < real)).all()
        assert ((made_rows >= 0) & (made_rows < made)).all()


def test_the_published_epoch_shows_a_third_of_the_real_images():
    rows = mixed_rows(50_000, 1_000_000, generator=generator())
    assert len(rows) == 98
    assert (len(rows[0][0]), len(rows[0][1])) == (154, 358)
    assert len(torch.cat([batch[0] for batch in rows]).unique()) == 98 * 154
    again = mixed_rows(50_000, 1_000_000, generator=generator())
    assert all(torch.equal(a, b) for pair in zip(rows, again, strict=True) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"real": 0}, ValueError, "mixed_rows: `real` must be at least 1"),
        ({"generated": 1.5}, TypeError, "mixed_rows: `generated` must be an integer"),
        ({"fraction": 1.2}, ValueError, "mixed_rows: `fraction` must lie in"),
        ({"batches": 0}, ValueError, "mixed_rows: `batches` must be at least 1"),
        ({"real": 100}, ValueError, "mixed_rows: `batch_size`=512 takes 154 real rows but `real` is 100"),
    ],
)
def test_numbers_that_make_no_batch_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        mixed_rows(**{"real": 1000, "generated": 1000, **options})


def test_the_decay_ramps_up_after_the_warm_up():
    decays = [ramped_decay(step, warmup=5) for step in range(3000)]
    assert decays[:5] == [0.0] * 5
    assert decays[5] == pytest.approx(0.1)
    assert decays == sorted(decays)
    first = next(step for step, decay in enumerate(decays) if decay == 0.995)
    assert first - 5 == 1790  # (1 + 1790) / (10 + 1790) is 0.995
    assert decays[first - 1] < 0.995
    with pytest.raises(ValueError, match="ramped_decay: `decay` must lie in"):
        ramped_decay(0, decay=1.5)


@pytest.mark.parametrize(("steps", "warmup"), [(400, 0.025), (110, 0.3), (7, 0.4)])
def test_one_cycle_is_torchs_rate_without_its_momentum(steps, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.2, total_steps=steps, pct_start=warmup, cycle_momentum=False
    )
    for step in range(steps):
        expected = optimizer.param_groups[0]["lr"]
        assert one_cycle_learning_rate(step, steps=steps, warmup=warmup) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        optimizer.step()
        if step < steps - 1:
            scheduler.step()
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_one_cycle_may_be_so_short_that_it_starts_at_its_peak():
    # torch's divides by zero there
    rates = [one_cycle_learning_rate(step, steps=40, warmup=0.025) for step in range(40)]
    assert rates[0] == max(rates) == 0.2
    assert rates == sorted(rates, reverse=True)
    assert one_cycle_learning_rate(0, steps=1) > 0


def test_one_cycle_of_torch_does_move_the_momentum():
    # What the page says of the trap, so that it is noticed if torch changes it.
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=40, pct_start=0.25)
    seen = []
    for _ in range(39):
        seen.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        scheduler.step()
    assert max(seen) == pytest.approx(0.95)
    assert min(seen) == pytest.approx(0.85)


def test_the_triangle_goes_up_and_down():
    rates = [triangular_learning_rate(step, total=10, peak=0.3, peak_at=0.4) for step in range(13)]
    assert rates[0] == 0
    assert max(rates) == rates[4] == pytest.approx(0.3)
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[10:] == [0, 0, 0]
    with pytest.raises(ValueError, match="triangular_learning_rate: `peak_at` must lie in"):
        triangular_learning_rate(0, total=1, peak_at=1.0)
    with pytest.raises(ValueError, match="one_cycle_learning_rate: `step` must lie in"):
        one_cycle_learning_rate(10, steps=10)
