"""Build step of the reference: its index lists what its pages hold; functions are told from modules of their name.

Overloads are shown as one function.
"""

import re
from pathlib import Path
from typing import Any

import griffe

REFERENCE = Path(__file__).parent / "reference"
MARK = "<!-- reference: names -->"
ENTRY = re.compile(r"^(?:::: |- \[`\w+`\]\[)([\w.]+)", re.MULTILINE)  # on the page, or in its list of links


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the index."""
    return markdown.replace(MARK, index()) if page.file.src_uri == "reference/index.md" else markdown


def index() -> str:
    """A table of all pages of the reference with the names that each documents or lists, linked."""
    lines = ["| page | names |", "|---|---|"]
    for path in sorted(REFERENCE.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        title = re.search(r"^# (?:Reference: )?(.+)$", text, re.MULTILINE)
        names = [f"[`{name.rpartition('.')[2]}`][{name}]" for name in ENTRY.findall(text)]
        if title and names:
            lines.append(f"| [{title[1]}]({path.relative_to(REFERENCE).as_posix()}) | {', '.join(names)} |")
    return "\n".join(lines)


class OneSignature(griffe.Extension):
    """Show the implementation's signature, which holds for every call, in the place of the overloads.

    And show the function where a module has its name: `perceptual_at.pgd` is the function, not the file that holds it.
    """

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Lead what the package exports to the function."""
        for name, member in list(pkg.members.items()):
            own = member.is_alias and member.target_path.startswith(f"{pkg.name}.")  # others are not read
            if own and member.target.is_module and name in member.target.members:
                pkg.set_member(name, griffe.Alias(name, member.target.members[name], parent=pkg))

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Forget a function's overloads."""
        func.overloads = None
