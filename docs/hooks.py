"""Build steps of the documentation: mathematics become MathML, so that pages need no script and no network."""

import html
import itertools
import re
from xml.etree import ElementTree

from latex2mathml.converter import convert_to_element
from mkdocs.exceptions import PluginError

# What pymdownx.arithmatex leaves of $...$ and $$...$$, on pages and in docstrings alike.
INLINE = re.compile(r'<span class="arithmatex">\\\((.+?)\\\)</span>([,.:;)]*)', re.DOTALL)
DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.+?)\\\]\s*</div>', re.DOTALL)

# What the converter does not know, in words that it knows.
REWRITES = (
    (r"\\\n", r"\\ "),
    (r"\\\\\[\w+\]", r"\\\\"),
    (r"(\\begin\{cases\}\s*)\[", r"\1{[}"),  # a bracket, not an option of the environment
    (r"\\big(?=\s*[()\[\]])", ""),
    (r"\\(big|Big|bigg|Bigg)\s*\\\|", "\\\\\\1\N{DOUBLE VERTICAL LINE}"),
    (r"\\arg\b", r"\\operatorname{arg}"),
    (r"\\operatorname\*", r"\\operatorname"),
)
TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
LEGIBLE = 24  # characters of code that fit beside another column on a phone
HEAD = re.compile(r"<th\b[^>]*>(.*?)</th>", re.DOTALL)
LIMITS = {"max", "min", "sup", "inf", "mean"}
FUNCTIONS = {"cos", "exp", "log", "sin", "tanh"}
ROWS = {"math", "mrow", "mstyle", "mtd"}
TIGHT = set("()[]{}|/\N{DOUBLE VERTICAL LINE}")
SIGNS, BEFORE_A_SIGN = {"+", "-", "\N{MINUS SIGN}"}, set("([{,=<>\N{LESS-THAN OR EQUAL TO}\N{GREATER-THAN OR EQUAL TO}")
THIN = "0.1667em"


def on_page_content(content, page, **_):
    """Replace the mathematics of a page."""

    def typeset(latex, *, display):
        try:
            return mathml(html.unescape(latex), display=display)
        except Exception as error:
            raise PluginError(f"{page.file.src_uri}: cannot typeset {latex!r}: {error!r}") from error

    def inline(match):
        code, punctuation = typeset(match[1], display=False), match[2]
        return f'<span class="unbroken">{code}{punctuation}</span>' if punctuation else code

    content = DISPLAY.sub(lambda match: typeset(match[1], display=True), content)
    content = INLINE.sub(inline, content)
    content = TABLE.sub(as_cards, content)
    if 'class="arithmatex"' in content:
        raise PluginError(f"{page.file.src_uri}: some mathematics were not recognised.")
    return content


def as_cards(match):
    """Name a table's columns in every cell, if it is wide: narrow screens show its rows as cards."""
    table = match[0]
    heads = [html.escape(re.sub("<[^>]+>", "", head).strip(), quote=True) for head in HEAD.findall(table)]
    longest = max((len(html.unescape(code)) for code in re.findall(r"<code>([^<]*)</code>", table)), default=0)
    if len(heads) < 3 and (len(heads) < 2 or longest < LEGIBLE):
        return table
    names = itertools.cycle(heads)
    table = re.sub(r"<td\b", lambda _: f'<td data-head="{next(names)}"', table)
    return table.replace("<table>", '<table class="cards">', 1)


def mathml(latex, *, display):
    """Turn LaTeX into MathML, with the spacing that LaTeX would give."""
    for pattern, replacement in REWRITES:
        latex = re.sub(pattern, replacement, latex)
    root = convert_to_element(latex, display="block" if display else "inline")
    for element in root.iter():
        element.text = html.unescape(element.text) if element.text else None
        if element.tag == "mi" and element.text == "~":
            element.tag, element.text = "mo", "\N{TILDE OPERATOR}"
        if element.tag == "mo" and element.text == "\N{INFINITY}":
            element.tag = "mi"
        if element.text and "\\" in element.text:
            raise ValueError(f"unknown command {element.text}")
    for parent in list(root.iter()):
        _tidy(parent, display)
    root.set("data-search-exclude", "")
    code = ElementTree.tostring(root, encoding="unicode").replace('data-search-exclude=""', "data-search-exclude")
    if not display:
        return code
    return f'<div class="display-math" role="group" aria-label="equation">{code}</div>'


def _tidy(parent, display):
    children = list(parent)
    if not children:
        return
    if parent.tag == "mrow" and len(children) > 1 and all(_is_upright_letter(child) for child in children):
        word = ElementTree.Element("mi")  # one identifier, `adv`, not the product of three
        word.text = "".join(child.text for child in children)
        parent[:] = [word]
        return
    base = children[0]
    if parent.tag in ("msub", "msup", "msubsup") and base.tag == "mo" and base.text in LIMITS and display:
        parent.tag = {"msub": "munder", "msup": "mover", "msubsup": "munderover"}[parent.tag]
    for before, child, following in zip([None, *children], children, [*children[1:], None], strict=False):
        if child.tag == "mi":
            if re.fullmatch("[\N{GREEK CAPITAL LETTER ALPHA}-\N{GREEK CAPITAL LETTER OMEGA}]", child.text or ""):
                child.set("mathvariant", "normal")
            elif child.text in FUNCTIONS and following is not None and following.tag != "mo" and parent.tag in ROWS:
                parent.insert(list(parent).index(following), ElementTree.Element("mspace", width=THIN))
        elif child.tag == "mo" and child.text:
            if child.text in SIGNS and before is not None and before.tag == "mo" and before.text in BEFORE_A_SIGN:
                child.set("form", "prefix")
            if child.text in TIGHT:
                child.attrib.update(lspace="0", rspace="0")
            elif child.text.isalpha() and child.text.isascii():
                child.attrib.update(lspace=THIN, rspace=THIN)
            if child.get("minsize") and parent.tag not in ROWS:  # a delimiter with a script is sized on its own
                parent[list(parent).index(child)] = row = ElementTree.Element("mrow")
                row.append(child)
                child.attrib.update(stretchy="true", symmetric="true")


def _is_upright_letter(element):
    return element.tag == "mi" and element.get("mathvariant") == "normal" and len(element.text or "") == 1


# What the theme forgot for those who see no screen or hold no mouse.
NAMES = (
    ('data-md-component="search" role="dialog"', 'data-md-component="search" role="dialog" aria-label="Search"'),
    (
        'class="md-header__button md-icon" for="__drawer"',
        'class="md-header__button md-icon" for="__drawer" tabindex="0" role="button" aria-label="Navigation"',
    ),
)


def on_post_page(output, **_):
    """Name what the theme leaves without a name."""
    for before, after in NAMES:
        if output.count(before) != 1:
            raise PluginError(f"the theme changed: {before!r} occurs {output.count(before)} times, not once")
        output = output.replace(before, after)
    return output.replace(' data-md-component="source"', "")  # with it, the theme asks the repository's host for stars


def on_post_template(output, template_name, **_):
    """The same for the page that is shown where there is none."""
    return on_post_page(output) if template_name == "404.html" else output
