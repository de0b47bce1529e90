"""Random numbers that belong to a sample: whatever the batch, the order, the number of processes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from perceptual_at import L1, L2, Linf, SampleGenerator, apgd, auto_attack, fab, pgd, square
from perceptual_at._random import _GAMMA, _mix, _signed
from tests.strategies import generator, seeds, uniform
from tests.test_attack_contract import CentralPatch, Pointwise

INDEX = torch.tensor([3, 1_000_000, 0, 17, 4, 99])


@given(seeds, st.permutations(range(6)), st.integers(1, 6))
def test_numbers_follow_their_sample_into_any_batch(seed, order, kept):
    rows = torch.tensor(order[:kept])
    whole, part = SampleGenerator(seed, INDEX), SampleGenerator(seed, INDEX[rows])
    for draw in (
        lambda numbers: numbers.uniform((len(numbers), 2, 3)),
        lambda numbers: numbers.uniform((len(numbers),), dtype=torch.float64),
        lambda numbers: numbers.normal((len(numbers), 5)),
        lambda numbers: numbers.exponential((len(numbers), 5)),
        lambda numbers: numbers.integers((len(numbers), 5), below=7),
        lambda numbers: numbers.signs((len(numbers), 5)),
        lambda numbers: numbers.radius(12),
        lambda numbers: numbers.fork(2).fork(1).uniform((len(numbers), 4)),
    ):
        assert torch.equal(draw(whole)[rows], draw(part))
        assert torch.equal(draw(whole.take(rows)), draw(part))


def test_seeds_streams_and_indices_matter_and_so_does_the_order_of_forks():
    def numbers(seed=0, index=(5,), forks=()):
        source = SampleGenerator(seed, torch.tensor(index))
        for stream in forks:
            source = source.fork(stream)
        return tuple(source.uniform((1, 4), dtype=torch.float64).flatten().tolist())

    variants = [
        numbers(), numbers(seed=1), numbers(seed=-1), numbers(index=(6,)), numbers(index=(-5,)), numbers(forks=(0,)),
        numbers(forks=(1,)), numbers(forks=(0, 1)), numbers(forks=(1, 0)), numbers(forks=(0, 0)), numbers(seed=2**63),
    ]  # fmt: skip
    assert len(set(variants)) == len(variants)
    assert numbers() == numbers()  # no state


def test_the_mixing_function_is_splitmix64():
    # the first outputs of the reference generator from state 0
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    state = torch.arange(1, 4) * _signed(_GAMMA)
    assert [value % 2**64 for value in _mix(state).tolist()] == expected


def test_numbers_have_the_distributions_they_are_named_after():
    source = SampleGenerator(0, torch.arange(400))
    uniforms = source.uniform((400, 500), dtype=torch.float64)
    assert 0 <= uniforms.min() < 1e-4
    assert 1 - 1e-4 < uniforms.max() < 1
    error = 4 / (400 * 500) ** 0.5  # four standard errors of a variable of variance one
    assert abs(uniforms.mean() - 0.5) < error / 12**0.5
    assert abs(torch.corrcoef(torch.stack([uniforms[:, :-1].flatten(), uniforms[:, 1:].flatten()]))[0, 1]) < error
    assert abs(torch.corrcoef(torch.stack([uniforms[:-1].flatten(), uniforms[1:].flatten()]))[0, 1]) < error
    normals = source.normal((400, 500), dtype=torch.float64)
    assert abs(normals.mean()) < error
    assert abs(normals.var() - 1) < 2**0.5 * error
    exponentials = source.exponential((400, 500), dtype=torch.float64)
    assert exponentials.min() > 0
    assert abs(exponentials.mean() - 1) < error
    assert abs(source.signs((400, 500)).double().mean()) < error
    counts = torch.bincount(source.integers((400, 500), below=7).flatten(), minlength=7)
    assert ((counts - 400 * 500 / 7).abs() < 4 * (400 * 500 / 7) ** 0.5).all()
    radii = SampleGenerator(0, torch.arange(40_000)).radius(3, dtype=torch.float64)
    assert abs(radii.mean() - 3 / 4) < 4 * (3 / 80 / 40_000) ** 0.5  # mean d / (d + 1), variance 3/80 for d = 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_numbers_never_round_up_to_one(dtype):
    source = SampleGenerator(0, torch.arange(2))
    source.bits = lambda shape: torch.full(shape, -1)  # all bits set
    assert source.uniform((2, 1), dtype=dtype).max() < 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0.5, [1]), TypeError, "`seed` must be an integer, got float"),
        ((True, [1]), TypeError, "`seed` must be an integer, got bool"),
        ((0, [0.5]), TypeError, r"`index` must be integers of shape \(B,\), got torch.float32"),
        ((0, torch.tensor([True])), TypeError, r"`index` must be integers of shape \(B,\), got torch.bool"),
        ((0, [[1]]), ValueError, r"`index` must be of shape \(B,\), got shape \(1, 1\)"),
        ((0, torch.tensor(1)), ValueError, r"`index` must be of shape \(B,\), got shape \(\)"),
    ],
)
def test_malformed_generators_are_refused(arguments, error, message):
    with pytest.raises(error, match=f"^SampleGenerator: {message}"):
        SampleGenerator(*arguments)


def test_numbers_for_other_samples_are_refused():
    source = SampleGenerator(0, [1, 2])
    with pytest.raises(ValueError, match=r"numbers for 2 samples cannot fill the shape \(3, 4\)"):
        source.uniform((3, 4))
    x, labels = uniform(0, 3, 4), torch.zeros(3, dtype=torch.long)
    for attack in (pgd, apgd, fab):
        with pytest.raises(ValueError, match=f"^{attack.__name__}: `generator` is for 2 samples but `x` has 3"):
            attack(torch.nn.Linear(4, 2).double(), x, labels, Linf(0.1), generator=source)


# Attacks ----------------------------------------------------------------------------------------------------------

ATTACKS = {
    "pgd": lambda f, x, y, **o: pgd(f, x, y, Linf(0.1), steps=3, **o),
    "pgd restarts": lambda f, x, y, **o: pgd(f, x, y, L2(0.4), steps=2, restarts=3, **o),
    "pgd L1": lambda f, x, y, **o: pgd(f, x, y, L1(1.0), steps=3, **o),
    "pgd own threat": lambda f, x, y, **o: pgd(f, x, y, CentralPatch(), steps=3, **o),
    "apgd": lambda f, x, y, **o: apgd(f, x, y, Linf(0.1), steps=10, restarts=2, **o),
    "apgd L2": lambda f, x, y, **o: apgd(f, x, y, L2(0.4), steps=10, target_classes=2, **o),
    "apgd L1": lambda f, x, y, **o: apgd(f, x, y, L1(1.0), steps=10, from_larger_eps=True, **o),
    "fab": lambda f, x, y, **o: fab(f, x, y, Linf(0.1), steps=5, restarts=2, **o),
    "square": lambda f, x, y, **o: square(f, x, y, Linf(0.1), queries=30, restarts=2, **o),
    "auto_attack": lambda f, x, y, **o: auto_attack(
        f, x, y, L2(0.4), batch_size=3,
        version=[("apgd-ce", {"steps": 5}), ("fab-t", {"steps": 5}), ("square", {"queries": 20})], **o,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_results_do_not_depend_on_batches_or_order(name):
    attack, x, labels = ATTACKS[name], uniform(0, 6, 3, 2, 2), torch.tensor([0, 1, 2, 3, 4, 0])
    whole = attack(Pointwise(), x, labels, generator=SampleGenerator(7, INDEX))
    for rows in torch.tensor([5, 2, 0, 3, 1, 4]).split(4), torch.arange(6).split(1):
        for at in rows:
            part = attack(Pointwise(), x[at], labels[at], generator=SampleGenerator(7, INDEX[at]))
            assert torch.equal(part, whole[at])
    if name not in ("apgd", "fab"):  # these end in the same corners from anywhere
        assert not torch.equal(whole, attack(Pointwise(), x, labels, generator=SampleGenerator(8, INDEX)))


def test_restarts_are_nested():
    x, labels = uniform(1, 6, 3, 2, 2), torch.tensor([0, 1, 2, 3, 4, 0])
    source = SampleGenerator(0, INDEX)
    single, several = (pgd(Pointwise(), x, labels, Linf(0.1), steps=1, restarts=r, generator=source) for r in (1, 4))
    loss = torch.nn.functional.cross_entropy
    values = [loss(Pointwise()(z), labels, reduction="none") for z in (single, several)]
    assert (values[1] >= values[0]).all()
    assert not torch.equal(single, several)


def test_a_torch_generator_gives_numbers_per_sample_to_those_that_need_them():
    x, labels = uniform(1, 6, 3, 2, 2), torch.tensor([0, 1, 2, 3, 4, 0])
    first, again = (apgd(Pointwise(), x, labels, L2(0.1), steps=2, generator=generator(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert_close(first, apgd(Pointwise(), x, labels, L2(0.1), steps=2, generator=generator(4)), rtol=0, atol=0.2)
