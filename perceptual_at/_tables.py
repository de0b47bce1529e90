"""Tables as text."""

from collections.abc import Sequence


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A pipe table; the first column is text, the others are numbers.

    Examples:
        >>> print(markdown_table(("", "clean"), [("PGD-AT", "84.10")]))
        |  | clean |
        |---|---:|
        | PGD-AT | 84.10 |
    """
    lines = [_line(head), f"|---|{'---:|' * (len(head) - 1)}", *(_line(row) for row in rows)]
    return "\n".join(lines)


def latex_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""A `tabular` that needs no package; `head` is LaTeX already, the other cells are text.

    Examples:
        >>> print(latex_table(("", "clean"), [("rpat_at", "84.10")]))
        \begin{tabular}{lr}
        \hline
         & clean \\
        \hline
        rpat\_at & 84.10 \\
        \hline
        \end{tabular}
        <BLANKLINE>
    """
    lines = [r"\begin{tabular}{l" + "r" * (len(head) - 1) + "}", r"\hline", " & ".join(head) + r" \\", r"\hline"]
    lines += [" & ".join(escaped(cell) for cell in row) + r" \\" for row in rows]
    return "\n".join([*lines, r"\hline", r"\end{tabular}", ""])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def escaped(text: str) -> str:
    """Text as LaTeX."""
    special = {"\\": r"\textbackslash{}", "±": r"$\pm$"} | {sign: "\\" + sign for sign in "&%$#_{}"}
    special |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(sign, sign) for sign in text)
