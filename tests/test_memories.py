"""Tables with one row per sample: found by number, pure, resumable, the same on every process."""

import math
import multiprocessing
import socket

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed
from torch.testing import assert_close

from perceptual_at.memories import ensemble_targets, ensemble_update, gathered, write
from tests.strategies import generator, normal, seeds


def batch(seed, samples=20, rows=6):
    index = torch.randperm(samples, generator=generator(seed))[:rows]
    return index, normal(seed, rows, 5)


@given(seeds)
def test_the_place_in_the_batch_does_not_matter(seed):
    index, logits = batch(seed)
    order = torch.randperm(6, generator=generator(seed + 1))
    start = normal(3, 20, 5).softmax(dim=1)
    assert torch.equal(ensemble_update(start, index, logits), ensemble_update(start, index[order], logits[order]))
    assert torch.equal(ensemble_targets(start, index)[order], ensemble_targets(start, index[order]))


def test_visits_average_exponentially_and_the_first_target_is_the_prediction():
    index, logits = batch(0)
    ensemble = ensemble_update(torch.zeros(20, 5, dtype=torch.float64), index, logits)
    assert_close(ensemble_targets(ensemble, index), logits.softmax(dim=1))
    second = normal(7, 6, 5)
    ensemble = ensemble_update(ensemble, index, second)
    weighted = 0.09 * logits.softmax(dim=1) + 0.1 * second.softmax(dim=1)
    assert_close(ensemble_targets(ensemble, index), weighted / 0.19)


def test_tables_are_left_untouched_and_without_a_gradient():
    index, logits = batch(0)
    table = torch.zeros(20, 5, dtype=torch.float64)
    after = ensemble_update(table, index, logits.requires_grad_())
    assert (table == 0).all()
    assert not after.requires_grad
    others = torch.ones(20, dtype=torch.bool).index_fill(0, index, False)
    assert (after[others] == 0).all()


def test_a_sample_that_comes_twice_counts_with_its_mean():
    logits = normal(0, 2, 5)
    table = ensemble_update(torch.zeros(3, 5, dtype=torch.float64), torch.tensor([1, 1]), logits)
    assert_close(table[1], 0.1 * logits.softmax(dim=1).mean(dim=0))


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_predictions_that_are_undefined_once_are_not_remembered(odd):
    logits, index, table = normal(0, 3, 5), torch.tensor([0, 1, 2]), torch.full((4, 5), 0.2, dtype=torch.float64)
    expected = ensemble_update(table, index, logits)
    expected[1] = table[1]
    logits[1, 2] = odd
    assert torch.equal(ensemble_update(table, index, logits), expected)


def test_a_run_that_is_killed_goes_on_as_it_was(tmp_path):
    table = torch.zeros(20, 5)
    for seed in range(3):
        table = ensemble_update(table, *batch(seed))
    torch.save(table, tmp_path / "ensemble.pt")
    again = torch.load(tmp_path / "ensemble.pt", weights_only=True)
    for seed in range(3, 6):
        table, again = (ensemble_update(t, *batch(seed)) for t in (table, again))
    assert torch.equal(table, again)


@given(seeds, st.integers(1, 20))
def test_what_is_written_is_found_again(seed, rows):
    index, _ = batch(seed, rows=rows)
    values = normal(seed, rows)
    memory = write(torch.zeros(20, dtype=torch.float64), index, values)
    assert torch.equal(memory[index], values)


def process(rank, port, results):
    """One of two processes: its own samples, then the table of all."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    ensemble = torch.zeros(20, 5)
    margins = torch.zeros(20)
    for step in range(3):
        index, logits = batch(step, rows=7)
        mine = slice(0, 4) if rank == 0 else slice(4, 7)  # batches of different sizes
        numbers, everybody, norms = gathered(index[mine], logits[mine].float(), logits[mine].float().norm(dim=1))
        ensemble = ensemble_update(ensemble, numbers, everybody)
        margins = write(margins, numbers, norms)
    results.put((rank, ensemble.numpy(), margins.numpy()))
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_keep_the_table_that_one_would():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    workers = [spawn.Process(target=process, args=(rank, port, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = {rank: tables for rank, *tables in (results.get(timeout=300) for _ in workers)}
    for worker in workers:
        worker.join()
    alone, margins = torch.zeros(20, 5), torch.zeros(20)
    for step in range(3):
        index, logits = batch(step, rows=7)
        alone = ensemble_update(alone, index, logits.float())
        margins = write(margins, index, logits.float().norm(dim=1))
    for rank in range(2):
        assert torch.equal(torch.from_numpy(found[rank][0]), alone)
        assert torch.equal(torch.from_numpy(found[rank][1]), margins)


@pytest.mark.parametrize("samples", [3, 4, 5])  # also as many as there are places in a row
def test_a_dense_ensemble_is_one_of_places(samples):
    logits, index = torch.randn(2, 3, 2, 4), torch.tensor([2, 0])
    moved = ensemble_update(torch.zeros(samples, 3, 2, 4), index, logits)
    for row, column in [(0, 0), (1, 3)]:
        alone = ensemble_update(torch.zeros(samples, 3), index, logits[:, :, row, column])
        torch.testing.assert_close(moved[:, :, row, column], alone)
    torch.testing.assert_close(ensemble_targets(moved, index), logits.softmax(dim=1))


TABLE = torch.zeros(4, 5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ensemble_update(TABLE, None, torch.zeros(2, 5)), TypeError, "ensemble_update: `index` .* NoneType"),
        (lambda: ensemble_update(TABLE, torch.tensor([0.0]), torch.zeros(1, 5)), TypeError, "ensemble_update: `index`"),
        (lambda: ensemble_update(TABLE, torch.tensor([4]), torch.zeros(1, 5)), ValueError, r"`index` .*\[0, 3\]"),
        (lambda: ensemble_update(TABLE, torch.tensor([0, 1]), torch.zeros(1, 5)), ValueError, "`logits` .* one row"),
        (lambda: ensemble_update(TABLE, torch.tensor([0]), torch.zeros(1, 5), momentum=1.0), ValueError, "`momentum`"),
        (lambda: ensemble_targets(TABLE.long(), torch.tensor([0])), TypeError, "ensemble_targets: `ensemble`"),
        (lambda: ensemble_targets(TABLE[:, 0], torch.tensor([0])), ValueError, r"`ensemble` must be of shape \(N, K\)"),
        (lambda: write(TABLE[:, 0], torch.tensor([0]), torch.zeros(1, 5)), ValueError, "write: `values` .* one row"),
        (lambda: gathered(torch.tensor([0]), torch.zeros(2)), ValueError, r"gathered: `values\[0\]` must have a row"),
        (lambda: gathered(None), TypeError, "gathered: `index`"),
    ],
)
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
