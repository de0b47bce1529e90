"""How the pictures of the documentation look and are written: as SVG, one file for light and one for dark pages."""

import dataclasses
import io
import re
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

import matplotlib
from matplotlib.figure import Figure

HERE = Path(__file__).parent
WIDTH = 700  # of a picture, in the units of its text sizes
TEXT, SMALL = 17, 16


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Colours for one background. `paper` is that background; the pictures themselves have none."""

    name: str
    paper: str
    text: str
    muted: str
    faint: str
    blue: str
    orange: str
    green: str
    purple: str
    red: str


LIGHT = Scheme(
    "light", paper="#ffffff", text="#20242e", muted="#5b6270", faint="#b4bac6",
    blue="#0b66b5", orange="#b94a00", green="#08764f", purple="#853c9c", red="#c0273d",
)  # fmt: skip
DARK = Scheme(
    "dark", paper="#1e2129", text="#e4e7ee", muted="#a9b0be", faint="#5a6273",
    blue="#6cb6f5", orange="#f59a54", green="#4fcf9f", purple="#d493ea", red="#f98597",
)  # fmt: skip
SCHEMES = (LIGHT, DARK)


def sheet(height: float) -> Figure:
    """An empty picture of the common width."""
    return Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")


def bare(ax: object, **limits: object) -> None:
    """Take ticks and frame off axes that show a plane, and make both directions alike."""
    ax.set(xticks=[], yticks=[], aspect="equal", **limits)
    ax.spines[:].set_visible(False)


def arrow(ax: object, start: object, end: object, colour: str, **how: object) -> None:
    """An arrow between two points of the axes."""
    look = {"arrowstyle": "-|>,head_width=0.28,head_length=0.55", "color": colour, "linewidth": 1.8}
    look |= {"shrinkA": 0, "shrinkB": 0, **how}
    ax.annotate("", xy=tuple(map(float, end)), xytext=tuple(map(float, start)), arrowprops=look)


def label(ax: object, point: object, text: str, colour: str, offset: tuple[float, float], **how: object) -> None:
    """Text beside a point, `offset` away in the units of the picture."""
    look = {"ha": "left" if offset[0] > 0 else "right" if offset[0] < 0 else "center", "va": "center", **how}
    place = tuple(map(float, point))
    ax.annotate(text, xy=place, xytext=offset, textcoords="offset points", color=colour, **look)


def write(
    name: str, title: str, description: str, draw: Callable[[Scheme], Figure], folder: Path | None = None
) -> list[Path]:
    """Draw in both schemes and write `name-light.svg` and `name-dark.svg`, the same bytes for the same drawing."""
    paths = []
    for scheme in SCHEMES:
        with matplotlib.rc_context(_settings(scheme)):
            buffer = io.StringIO()
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            draw(scheme).savefig(buffer, format="svg", transparent=True, metadata=nothing)
        path = (folder or HERE) / f"{name}-{scheme.name}.svg"
        path.write_text(_tidy(buffer.getvalue(), title, description), encoding="utf-8")
        paths.append(path)
    return paths


def _settings(scheme: Scheme) -> dict[str, object]:
    settings: dict[str, object] = dict(matplotlib.rcParamsDefault)
    settings.pop("backend", None)
    line = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), scheme.muted)
    words = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor"), scheme.text
    )
    size = dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), TEXT)
    small = dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), SMALL)
    cycle = [scheme.blue, scheme.orange, scheme.green, scheme.purple, scheme.red, scheme.muted]
    return {
        **settings, **line, **words, **size, **small,
        "axes.prop_cycle": matplotlib.cycler(color=cycle),
        "svg.hashsalt": "perceptual_at", "svg.fonttype": "path", "path.simplify": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 1.2, "lines.linewidth": 2.4,
        "legend.frameon": False, "legend.handletextpad": 0.6, "legend.columnspacing": 1.4,
        "figure.constrained_layout.w_pad": 0.06, "figure.constrained_layout.h_pad": 0.06,
    }  # fmt: skip


def _tidy(svg: str, title: str, description: str) -> str:
    """Drop the document type, round coordinates, and say what the picture is."""
    svg = re.sub(r"<!DOCTYPE[^>]*>\n?|<!--.*?-->\n?", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg\b[^>]*?) width="([\d.]+)pt" height="([\d.]+)pt"', r'\1 width="\2" height="\3"', svg)
    words = f'<title id="title">{escape(title)}</title>\n <desc id="desc">{escape(description)}</desc>'
    svg = re.sub(r"(<svg\b[^>]*)>", rf'\1 role="img" aria-labelledby="title desc">\n {words}', svg, count=1)

    def rounded(match: re.Match[str]) -> str:
        return re.sub(r"-?\d+\.\d+(?:e-\d+)?", lambda number: f"{round(float(number[0]), 2) + 0.0:g}", match[0])

    svg = re.sub(r'\b(?:d|x|y|points)="[^"]*"|translate\([^)]*\)', rounded, svg)
    return re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE)
