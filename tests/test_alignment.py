"""DICAR's term inside the objectives: what its mean runs over, in one process and in several."""

import subprocess
import sys

import pytest
import torch

from perceptual_at import objectives


@pytest.mark.parametrize("name", ["raat", "raat_plus_plus", "dicar"])
def test_what_the_mean_of_dicar_runs_over_is_checked_at_once(name):
    views, labels = (torch.rand(6, 3), torch.rand(6, 3)), torch.arange(6) % 4
    with pytest.raises(ValueError, match=f"{name}: `average_over` must be one of 'selected', 'selected_everywhere'"):
        getattr(objectives, name)(
            torch.nn.Linear(3, 4), views, labels, lambda model, x, labels, **options: x, mix=0.5, average_over="mean"
        )


@pytest.mark.parametrize("name", ["raat", "raat_plus_plus", "dicar"])
def test_a_single_pair_that_batch_norm_cannot_take_is_left_out_of_the_step(name):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 4))
    views, labels = (torch.rand(6, 3), torch.rand(6, 3)), torch.arange(6) % 4

    def terms_of(kept, **more):
        mask = torch.arange(6) < kept
        attack = lambda model, x, labels, **options: x + 0.1  # noqa: E731
        return getattr(objectives, name)(net, views, labels, attack, mix=0.5, mask=mask, **more)[1]

    assert terms_of(1)["dicar"] == 0
    assert terms_of(2)["dicar"] > 0
    net.eval()
    assert terms_of(1)["dicar"] > 0  # running statistics are no matter of the batch
    net[1].register_forward_hook(lambda layer, inputs, output: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        terms_of(1)


SHARED = """
import sys, torch
import torch.distributed as dist
from torch import nn
from perceptual_at import objectives

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
net = nn.Linear(2, 3, dtype=torch.float64)
x1, x2, labels = torch.rand(8, 2).double(), torch.rand(8, 2).double(), torch.arange(8) % 3
mask = torch.tensor([True, False, False, False, True, True, True, False])  # one pair here, three there; then none
attack = lambda model, x, labels: x + 0.1
options = {"mix": 0.7, "bound": False}
for chosen in (mask, torch.tensor([False] * 4 + [True] * 4), torch.zeros(8, dtype=torch.bool)):
    mine = slice(4 * rank, 4 * rank + 4)
    net.zero_grad()
    loss, terms = objectives.raat(net, (x1[mine], x2[mine]), labels[mine], attack, mask=chosen[mine],
                                  average_over="selected_everywhere", **options)
    loss.backward()
    found = torch.cat([p.grad.flatten() for p in net.parameters()] + [terms["dicar"].reshape(1)])
    dist.all_reduce(found)
    net.zero_grad()
    loss, terms = objectives.raat(net, (x1, x2), labels, attack, mask=chosen, **options)
    loss.backward()
    wanted = torch.cat([p.grad.flatten() for p in net.parameters()] + [terms["dicar"].reshape(1)])
    torch.testing.assert_close(found / 2, wanted)
dist.destroy_process_group()
print("equal")
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_the_mean_over_the_pairs_of_two_processes_is_that_of_one(tmp_path):
    words = [sys.executable, "-c", SHARED]
    started = [
        subprocess.Popen([*words, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=600)[0].decode() for process in started]
    assert all(text.endswith("equal\n") for text in printed), printed
