"""The trade-off plot, and files that are whole or not there."""

import pytest
import torch

from perceptual_at import Evaluation, plotting
from perceptual_at._files import written_whole
from perceptual_at.published import published

RUNS = {"PGD-AT": [(84.1, 51.8), (84.4, 51.5)], "TRADES": [(82.9, 52.8)]}


def test_every_method_is_in_the_legend_and_its_mean_on_the_plot():
    ax = plotting.trade_off(RUNS)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["PGD-AT", "TRADES"]
    means = [tuple(collection.get_offsets()[0]) for collection in ax.collections if collection.get_label() in RUNS]
    assert means[0] == pytest.approx((84.25, 51.65))
    assert means[1] == pytest.approx((82.9, 52.8))


def test_contour_lines_are_lines_of_equal_nrr():
    ax = plotting.trade_off(RUNS)
    lines = [collection for collection in ax.collections if hasattr(collection, "levels")]
    assert lines
    for level, paths in zip(lines[0].levels, lines[0].allsegs, strict=True):
        for path in paths:
            for clean, robust in path[::10]:
                assert 2 * clean * robust / (clean + robust) == pytest.approx(level, rel=1e-4)


def test_own_results_stand_among_the_published_ones():
    rows = published(paper="RAAT", table=1, dataset="CIFAR-10", model="ResNet-18")
    verdicts = torch.tensor([True] * 80 + [False] * 20), {"aa": torch.tensor([True] * 50 + [False] * 50)}
    ax = plotting.published_trade_offs(rows, own={"mine": Evaluation(*verdicts)})
    star = next(collection for collection in ax.collections if collection.get_label() == "mine")
    assert tuple(star.get_offsets()[0]) == pytest.approx((80.0, 50.0))
    assert {text.get_text() for text in ax.texts} >= {row.method for row in rows}
    low, high = ax.get_xlim()
    assert all(low < row.clean < high for row in rows)
    with pytest.raises(ValueError, match="`rows` is empty"):
        plotting.published_trade_offs([])


def test_a_method_without_runs_is_refused():
    with pytest.raises(ValueError, match="no run for 'RAAT'"):
        plotting.trade_off({"RAAT": []})


def test_drawing_on_given_axes_returns_them():
    ax = plotting.trade_off(RUNS)
    assert plotting.trade_off({"RAAT": [(80.0, 50.0)]}, ax=ax) is ax


def test_a_file_is_replaced_only_when_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "result.json"
    with written_whole(target) as path:
        path.write_text("first")

    def fail_half_way():
        with written_whole(target) as path:
            path.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert target.read_text() == "first"
    assert [entry.name for entry in target.parent.iterdir()] == ["result.json"]


def test_an_unwritable_folder_loses_nothing(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("kept")
    with pytest.raises(OSError, match="file"), written_whole(blocked / "result.json"):
        pass
    assert blocked.read_text() == "kept"
