"""The trade-off plot, and files that are whole or not there."""

import itertools
import sys

import pytest
import torch

from perceptual_at import Evaluation, plotting
from perceptual_at._files import written_whole
from perceptual_at.diagnostics import PerceptionGap
from perceptual_at.published import published

RUNS = {"PGD-AT": [(84.1, 51.8), (84.4, 51.5)], "TRADES": [(82.9, 52.8)]}


@pytest.mark.slow
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


@pytest.mark.parametrize(("function", "given"), [
    ("trade_off", (RUNS,)), ("published_trade_offs", (published(paper="RAAT", table=1),)),
    ("accuracy_bars", (Evaluation(torch.tensor([True]), {}),)), ("perception_paths", ([1.0], {})),
])  # fmt: skip
def test_a_plot_says_in_its_own_name_that_matplotlib_is_missing(monkeypatch, function, given):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=f"^{function}: matplotlib is needed for plots"):
        getattr(plotting, function)(*given)


def words(ax):
    """What is written in and around a plot that can be seen."""
    ax.figure.draw_without_rendering()
    legend = ax.get_legend().get_texts() if ax.get_legend() else []
    ticks = [word for word in ax.get_xticklabels() if word.get_text() and word.get_rotation() != 30]
    return {id(word): word for word in (*ax.texts, *ticks, *legend) if word.get_visible()}.values()


def meeting(ax):
    """Pairs of words that cover each other."""
    from matplotlib.text import Text

    boxes = [(word.get_text(), Text.get_window_extent(word)) for word in words(ax)]
    return [(a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.overlaps(other)]


def named_points(count, canvas=None):
    """Methods side by side, each with its name at its point."""
    from matplotlib.figure import Figure

    figure = Figure()
    if canvas is not None:
        canvas(figure)
    means = {f"PGD-AT and more {i}": (80 + 0.1 * i, 50 + 0.1 * (i % 3)) for i in range(count)}
    ax = plotting.trade_off({name: [mean] for name, mean in means.items()}, ax=figure.subplots())
    ax.get_legend().remove()
    assert [name.get_text() for name in plotting.name_points(ax, means, fontsize=8)] == list(means)
    return ax


def test_names_are_placed_on_any_canvas():
    svg = pytest.importorskip("matplotlib.backends.backend_svg")
    ax = named_points(8, svg.FigureCanvasSVG)
    assert meeting(ax) == []


def test_a_number_on_a_line_gives_way_to_a_name():
    ax = plotting.trade_off(RUNS)
    number = next(text for marks in ax.collections for text in getattr(marks, "labelTexts", ()) if text.get_visible())
    plotting.name_points(ax, {"here": number.get_position()})
    assert not number.get_visible()


def test_names_keep_off_what_shall_stay_clear():
    from matplotlib.text import Text

    place = {"a name": (84.0, 52.0)}
    (free,) = plotting.name_points(plotting.trade_off(RUNS), place)
    ax = plotting.trade_off(RUNS)
    covered = ax.transData.inverted().transform(Text.get_window_extent(free).get_points().mean(axis=0))
    (moved,) = plotting.name_points(ax, place, clear=[tuple(covered)])
    assert not Text.get_window_extent(moved).contains(*ax.transData.transform(covered))


def test_what_cannot_be_named_is_refused():
    ax = plotting.trade_off(RUNS)
    for wrong, words in {"points": {"points": [1, 2]}, "ax": {"ax": None}}.items():
        with pytest.raises(TypeError, match=f"^name_points: `{wrong}` must be"):
            plotting.name_points(**{"ax": ax, "points": {}, **words})
    with pytest.raises(TypeError, match=r"^name_points: `points` must hold pairs"):
        plotting.name_points(ax, {"PGD-AT": 3.0})


EVALUATED = Evaluation(
    torch.tensor([True, True, False]),
    {f"an attack of long name {i}": torch.tensor([True, False, False]) for i in range(7)},
)
GAP = PerceptionGap(torch.tensor([1.0, 2.0]), torch.tensor([True, False]), torch.tensor([True, True]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "draw",
    [
        lambda: plotting.published_trade_offs(published(paper="RPAT", table=4, dataset="CIFAR-10")),
        lambda: plotting.published_trade_offs(2 * published(paper="RAAT", table=3, dataset="CIFAR-100")),
        lambda: named_points(9),
        lambda: plotting.trade_off({f"method {i}": [(80 + i, 50 - i), (80.5 + i, 49.5 - i)] for i in range(6)}),
        lambda: plotting.accuracy_bars({"a model": EVALUATED, "another": EVALUATED}),
        lambda: plotting.perception_bars({f"PGD-AT and more {i}": GAP for i in range(3)}),
        lambda: plotting.perception_bars({f"PGD-AT and so much more {i}": GAP for i in range(9)}),
    ],
)
def test_labels_never_cover_each_other(draw):
    assert meeting(draw()) == []


@pytest.mark.slow
def test_words_on_the_axis_turn_no_further_than_they_must():
    turned = [
        plotting.perception_bars({f"{name} {i}": GAP for i in range(many)}).get_xticklabels()[0].get_rotation()
        for name, many in (("A", 3), ("PGD-AT and more", 5), ("PGD-AT and more", 25))
    ]
    assert turned == [0, 30, 90]


def test_a_method_without_runs_is_refused():
    with pytest.raises(ValueError, match="no run for 'RAAT'"):
        plotting.trade_off({"RAAT": []})


def test_points_and_places_are_numbers_of_every_kind():
    numpy = pytest.importorskip("numpy")
    rows = [(84.25, 51.5), (84.5, 51.75)]
    for runs in (numpy.array(rows, dtype="float32"), torch.tensor(rows), [numpy.float32(one) for one in rows]):
        ax = plotting.trade_off({"PGD-AT": runs})
        assert ax.collections[0].get_offsets().tolist() == [list(row) for row in rows]
    path = torch.tensor([[0.0], [1.0], [2.0]], requires_grad=True)
    for alphas in ([0.0, 0.5, 1.0], torch.linspace(0, 1, 3), numpy.linspace(0, 1, 3)):
        assert plotting.perception_paths(alphas, {"linear": path}).lines[0].get_xdata().tolist() == [0.0, 0.5, 1.0]
    for wrong, words in {
        None: "must hold pairs",
        (1.0, 2.0): "must hold pairs",
        ((1.0, float("nan")),): "got nan",
    }.items():
        with pytest.raises((TypeError, ValueError), match=f"^trade_off: `results` .*{words}"):
            plotting.trade_off({"PGD-AT": wrong})


@pytest.mark.parametrize("alphas", [[], [0.0, 0.5], [1.0, 0.0], [0.0, 1.5]])
def test_a_path_that_does_not_end_with_the_whole_is_refused(alphas):
    with pytest.raises(ValueError, match=r"^perception_paths: `alphas` must end with 1"):
        plotting.perception_paths(alphas, {"linear": torch.ones(len(alphas), 3)})


@pytest.mark.parametrize("shape", [(2,), (3, 4), (2, 3, 4)])
def test_a_path_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"^perception_paths: 'linear' must be of shape \(2, B\)"):
        plotting.perception_paths([0.0, 1.0], {"linear": torch.ones(shape)})


def test_the_axes_say_what_was_asked_for():
    runs = {"PGD-AT": [(0.8, 0.5), (0.7, 0.55)]}
    ax = plotting.trade_off(runs, unit="fraction", robust_name="AutoAttack")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("clean accuracy (fraction)", "AutoAttack accuracy (fraction)")


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
