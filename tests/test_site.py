"""The documentation in a browser: found, read and used, with a mouse, a thumb and the keyboard, and without a network.

The tests build the site, serve it from this machine and look at it in headless Chromium; `tools/browser` installs one.
"""

import contextlib
import functools
import http.server
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from importlib import resources
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent / "site"
SURVEY, CONTRAST = ((HERE / name).read_text(encoding="utf-8") for name in ("survey.js", "contrast.js"))
NO_WORKERS = "window.Worker = class extends EventTarget { postMessage() {} }"

FLAGS = [
    "--disable-gpu", "--disable-quic", "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # nothing could leave if it tried
]  # fmt: skip
DESKTOP = {"viewport": {"width": 1280, "height": 900}}
NARROW = {"viewport": {"width": 390, "height": 844}}  # a window made small, or zoomed: there is a keyboard
PHONE = {**NARROW, "is_mobile": True, "has_touch": True}

LOSS = "losses/robust_perception.html"
READ_ALOUD = [
    "index.html", LOSS, "reference/divergences.html", "reference/attacks/pgd.html", "gallery.html",
    "how-to/segmentation.html",
    *(f"{kind}/{page.stem}.html" for kind in ("theory", "explanation", "tutorials")
      for page in sorted((ROOT / "docs" / kind).glob("*.md"))[:1]),
]  # fmt: skip


@pytest.fixture(scope="module")
def chromium():
    """A browser; it closes with this module, as it keeps an event loop running."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CHROME_BIN") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no browser is installed; `sh tools/browser` brings one, or set CHROME_BIN")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for tool in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"{tool} is not installed; `uv pip install --group docs` brings it")
    folder = tmp_path_factory.mktemp("site")
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert build.returncode == 0, build.stdout + build.stderr
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served(folder):
    """The address under which a folder is served."""
    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def window(browser, address, *, scheme="light", **shape):
    """An empty page in a fresh profile, with what it asks for and complains about in `page.requests`, `page.errors`."""
    with browser.new_context(base_url=address, color_scheme=scheme, reduced_motion="reduce", **shape) as context:
        context.set_default_timeout(10_000)
        page = context.new_page()
        page.requests, page.errors = [], []
        context.on("request", lambda request: page.requests.append(request.url))
        context.on("console", lambda said: said.type == "error" and page.errors.append(said.text))
        context.on("weberror", lambda thrown: page.errors.append(str(thrown.error)))
        yield page


def abroad(page, address):
    """The requests of a page that leave the machine."""
    return [url for url in page.requests if not url.startswith((address, "data:", "blob:"))]


@pytest.fixture(scope="module")
def address(chromium, site):  # no browser, no build
    with served(site) as address:
        yield address


@pytest.fixture
def opened(chromium, address):
    """Open a page of the site in a window of a shape; whatever a test then does, it stays offline and without error."""
    with contextlib.ExitStack() as windows:
        pages = []

        def goto(path, **shape):
            page = windows.enter_context(window(chromium, address, **shape))
            pages.append(page)
            assert page.goto(path).ok
            return page

        yield goto
        for page in pages:
            assert abroad(page, address) == []
            assert page.errors == []


# All pages --------------------------------------------------------------------------------------------------------


def look(page, path):
    """Survey a page on a phone, then on a screen."""
    page.requests.clear()
    page.errors.clear()
    page.goto(path)
    page.set_viewport_size(PHONE["viewport"])
    phone = page.evaluate(SURVEY, PHONE["viewport"]["width"])
    page.set_viewport_size(DESKTOP["viewport"])
    screen = page.evaluate(SURVEY, DESKTOP["viewport"]["width"])
    return {"phone": phone, "screen": screen, "errors": [*page.errors], "requests": [*page.requests]}


@pytest.fixture(scope="module")
def surveys(chromium, address, site):
    """What `survey.js` and the console say of every page of the site."""
    paths = sorted(page.relative_to(site).as_posix() for page in site.rglob("*.html"))
    with window(chromium, address, **PHONE) as page:
        page.add_init_script(NO_WORKERS)  # the search would index the whole site on every page; others test it
        found = {}
        for path in paths:
            found[path] = look(page, path)
            found[path]["abroad"] = abroad(page, address)
        return found


def faults(surveys, *keys):
    """The pages of which something is said, and what."""
    said = {path: functools.reduce(lambda part, key: part[key], keys, survey) for path, survey in surveys.items()}
    return {path: fault for path, fault in said.items() if fault}


def test_no_request_leaves_the_machine(surveys):
    assert all(survey["requests"] for survey in surveys.values())
    assert faults(surveys, "abroad") == {}
    assert faults(surveys, "screen", "hints") == {}


def test_no_page_writes_an_error_to_the_console(surveys):
    assert faults(surveys, "errors") == {}


def test_mathematics_is_rendered(surveys):
    losses = [path for path in surveys if path.startswith("losses/") and path != "losses/index.html"]
    assert LOSS in losses
    assert [path for path in losses if surveys[path]["screen"]["formulas"] == 0] == []
    assert faults(surveys, "screen", "flat") == {}
    assert faults(surveys, "phone", "flat") == {}


@pytest.mark.parametrize("device", ["phone", "screen"])
def test_no_equation_is_clipped(surveys, device):
    assert faults(surveys, device, "clipped") == {}


def test_equations_are_set_in_the_font_that_the_site_brings(opened):
    page = opened(LOSS, **DESKTOP)
    assert page.evaluate("document.fonts.ready.then(() => document.fonts.check('16px \"STIX Two Math\"'))")
    assert any(url.endswith("stix-two-math.woff2") for url in page.requests)


def test_no_page_shows_raw_latex_or_markdown(surveys):
    assert faults(surveys, "screen", "raw") == {}


def test_every_picture_loads_and_is_described(surveys):
    assert faults(surveys, "screen", "pictures") == {}


@pytest.mark.parametrize("device", ["phone", "screen"])
def test_nothing_sticks_out_at_the_side(surveys, device):
    assert faults(surveys, device, "wide") == {}


# A few pages, used ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_search_finds_a_function(opened, shape):
    page = opened("index.html", **shape)
    if shape is PHONE:
        page.locator("label.md-header__button[for=__search]").tap()
    else:
        page.locator(".md-search__input").click()
    page.keyboard.type("robust_perception_loss")
    result = page.locator(".md-search-result__link[href$='#perceptual_at.robust_perception_loss']:visible").first
    result.click()
    heading = page.locator("[id='perceptual_at.robust_perception_loss']")
    heading.wait_for()
    assert "/index.html" not in page.url
    assert "robust_perception_loss" in heading.inner_text()
    page.wait_for_function("heading => heading.getBoundingClientRect().top < innerHeight", arg=heading.element_handle())


def found_first(page, words, count=5):
    """The pages of the first results for some words."""
    page.locator(".md-search__input").fill("")
    page.locator(".md-search__input").click()
    page.keyboard.type(words)
    page.wait_for_function(
        "words => document.querySelector('.md-search__input').value === words"
        " && document.querySelector('.md-search-result__link[href*=\"h=\"]')",
        arg=words,
    )
    links = page.locator(".md-search-result__item > .md-search-result__link").all()[:count]
    return [link.get_attribute("href").partition("?")[0].partition("#")[0] for link in links]


@pytest.mark.parametrize(
    ("words", "wanted"),
    {
        "own dataset": "how-to/your-model-and-data.html", "normalise": "faq.html", "EMA": "averaging.html",
        "AWP": "faq.html", "epsilon": "faq.html", "learning rate": "faq.html", "pretrained": "faq.html",
    }.items(),
)  # fmt: skip
def test_search_finds_the_answer(opened, words, wanted):
    results = found_first(opened("index.html", **DESKTOP), words)
    assert any(result.endswith(wanted) for result in results), results


def test_the_site_searches_when_it_is_opened_from_its_folder(chromium, site):
    with window(chromium, None, **DESKTOP) as page:
        page.goto((site / "index.html").as_uri())
        assert "robust_perception" in " ".join(found_first(page, "robust_perception_loss"))
        assert [url for url in page.requests if not url.startswith(("file:", "data:", "blob:", "about:"))] == []
        assert page.errors == []


def test_the_cheat_sheet_prints_on_one_sheet(opened, tmp_path):
    page = opened("cheat-sheet.html", **DESKTOP)
    printed = page.pdf(format="A4")
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) == 1


def test_tables_of_differences_are_cards_on_a_phone(opened):
    page = opened("losses/trades.html", **PHONE)
    table = page.locator("table.cards").last
    assert table.locator("td").first.evaluate("cell => getComputedStyle(cell).display") == "block"
    assert table.locator("td").first.evaluate("cell => getComputedStyle(cell, '::before').content") not in (
        "none",
        '""',
    )
    assert table.evaluate("table => table.scrollWidth <= table.clientWidth")


def test_a_copy_button_covers_no_code_on_a_phone(opened):
    page = opened("index.html", **PHONE)
    button = page.locator(".md-code__nav, .md-clipboard").first.bounding_box()
    code = page.locator("pre > code").first.bounding_box()
    assert code["x"] + code["width"] <= button["x"] + 1


def paper(page):
    """The lightness of the paper, 0 to 255."""
    return page.evaluate("Math.max(...getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g).slice(0, 3))")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_palette_follows_the_system_then_the_reader(opened, scheme):
    page = opened("index.html", scheme=scheme, **DESKTOP)
    is_light = paper(page) > 200
    assert is_light == (scheme == "light")
    page.locator("label.md-header__button[for^=__palette]:visible").click()
    assert paper(page) < 70 if is_light else paper(page) > 200
    page.goto(LOSS)
    assert paper(page) < 70 if is_light else paper(page) > 200


def in_view(locator):
    box, view = locator.bounding_box(), locator.page.viewport_size
    return (
        box is not None
        and box["x"] >= 0
        and box["x"] + box["width"] <= view["width"]
        and 0 <= box["y"] < view["height"]
    )


def test_navigation_drawer_opens_on_a_phone(opened):
    page = opened("index.html", **PHONE)
    drawer = page.locator(".md-sidebar--primary")
    link = page.locator(f"a.md-nav__link[href='{LOSS}']")
    assert not in_view(drawer)
    page.locator("label.md-header__button[for=__drawer]").tap()
    page.wait_for_function("drawer => drawer.getBoundingClientRect().left >= 0", arg=drawer.element_handle())
    for section in page.locator("li.md-nav__item--nested", has=link).all():
        section.locator("label.md-nav__link").first.tap()
    link.tap()
    page.wait_for_url(f"**/{LOSS}")
    assert "Robust perception" in page.locator("h1").inner_text()


# Keyboard ---------------------------------------------------------------------------------------------------------


def focused(page):
    """What a person sees of the focused element: itself, or the button for which the palette's input stands."""
    return page.evaluate_handle(
        "document.activeElement.matches('.md-option')"
        " ? document.querySelector('.md-option ~ label:not([hidden])') : document.activeElement"
    ).as_element()


def picture(page, box):
    """A picture of a box with a rim around it, as bytes."""
    left, top = max(box["x"] - 6, 0), max(box["y"] - 6, 0)
    right, bottom = box["x"] + box["width"] + 6, box["y"] + box["height"] + 6
    view = page.viewport_size
    clip = {"x": left, "y": top, "width": min(right, view["width"]) - left, "height": min(bottom, view["height"]) - top}
    return page.screenshot(clip=clip)


def comes_into_sight(page, element):
    """Whether an element is on the screen, now or in a second: the search field of a phone opens when it has focus."""
    for _ in range(20):
        box, view = element.bounding_box(), page.viewport_size
        if (
            element.evaluate("e => e.checkVisibility({ opacityProperty: true, visibilityProperty: true })")
            and box["width"] * box["height"]
            and -box["width"] < box["x"] < view["width"]
            and -box["height"] < box["y"] < view["height"]
        ):
            return True
        page.wait_for_timeout(50)
    return False


def unseen_stops(page, stops):
    """Press Tab and say where no one could see the focus: off the screen, or the same picture with it and without."""
    page.add_style_tag(content="* { scroll-behavior: auto !important; transition: none !important }")
    unseen = []
    for _ in range(stops):
        page.keyboard.press("Tab")
        element = focused(page)
        name = element.evaluate("e => `<${e.localName} class='${e.className}'> ${e.textContent.trim().slice(0, 40)}`")
        if not comes_into_sight(page, element):
            unseen.append(name)
            continue
        if element.evaluate("e => e.matches('input[type=text]')"):
            continue  # it shows a caret, which pictures leave out
        box = element.bounding_box()
        held = picture(page, box)
        page.evaluate("document.activeElement.blur()")  # the next Tab still starts from here
        if picture(page, box) == held:
            unseen.append(name)
    return unseen


def test_skip_link_leads_to_the_content(opened):
    page = opened(LOSS, **DESKTOP)
    page.keyboard.press("Tab")
    skip = page.locator(".md-skip:focus")
    page.wait_for_function("link => getComputedStyle(link).opacity === '1'", arg=skip.element_handle())
    assert in_view(skip)
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.locator(".md-content :focus").count() == 1


@pytest.mark.parametrize(("shape", "stops"), [(DESKTOP, 32), (NARROW, 16)], ids=["desktop", "narrow"])
def test_focus_is_seen_at_every_stop(opened, shape, stops):
    assert unseen_stops(opened(LOSS, **shape), stops) == []


def test_keyboard_searches_and_follows_the_result(opened):
    page = opened("index.html", **DESKTOP)
    page.keyboard.press("/")
    page.keyboard.type("robust_perception_loss")
    page.locator(".md-search-result__link").first.wait_for()
    page.keyboard.press("ArrowDown")
    address = page.locator(".md-search-result__link:focus").get_attribute("href")
    page.keyboard.press("Enter")
    page.wait_for_url(address.partition("?")[0] + "*")
    assert "robust_perception_loss" in page.locator(".md-content").inner_text()


def test_keyboard_switches_the_palette(opened):
    page = opened("index.html", **DESKTOP)
    for _ in range(5):
        page.keyboard.press("Tab")
        if page.locator(".md-option:focus").count():
            break
    before = paper(page)
    page.keyboard.press("Enter")
    assert abs(paper(page) - before) > 130


def test_keyboard_opens_the_navigation_of_a_narrow_window(opened):
    page = opened("index.html", **NARROW)
    for _ in range(5):
        page.keyboard.press("Tab")
        if page.locator("[for=__drawer]:focus").count():
            break
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('.md-sidebar--primary').getBoundingClientRect().left >= 0")
    for _ in range(8):
        page.keyboard.press("Tab")
        if page.locator("a.md-nav__link:focus").count():
            break
    assert in_view(page.locator("a.md-nav__link:focus"))


# Accessibility ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def axe():
    package = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python, which has axe, is missing")
    return (resources.files(package) / "axe.min.js").read_text(encoding="utf-8")


def violations(page, axe):
    """What axe finds on a page that is more than minor, with the first places."""
    page.evaluate(axe)
    options = "resultTypes: ['violations'], preload: false"
    runs = (
        f"document, {{ {options}, rules: {{ 'color-contrast': {{ enabled: false }} }} }}",
        f"{{ include: ({CONTRAST})() }}, {{ {options}, runOnly: ['color-contrast'] }}",
    )
    found = [fault for run in runs for fault in page.evaluate(f"axe.run({run}).then((found) => found.violations)")]
    return {
        fault["id"]: [f"{node['html'][:120]}: {node['failureSummary'][:300]}" for node in fault["nodes"][:3]]
        for fault in found
        if fault["impact"] != "minor"
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", READ_ALOUD)
def test_axe_finds_nothing_above_minor(opened, axe, path, scheme):
    page = opened(path, scheme=scheme, **DESKTOP)
    assert violations(page, axe) == {}
    page.set_viewport_size(NARROW["viewport"])
    assert violations(page, axe) == {}


# The checks themselves --------------------------------------------------------------------------------------------


def test_checks_see_all_that_is_wrong_with_a_broken_page(chromium, axe):
    with served(HERE) as address, window(chromium, address, **PHONE) as page:
        survey = look(page, "broken.html")
        assert abroad(page, address) == ["https://pictures.example/picture.png"]
        assert any("said to the console" in error for error in survey["errors"])
        assert any("thrown by a script" in error for error in survey["errors"])
        assert any("404" in error for error in survey["errors"])
        assert len(survey["screen"]["flat"]) == 2
        assert len(survey["screen"]["raw"]) == 1
        assert len(survey["phone"]["wide"]) == 2
        assert survey["screen"]["wide"] == []
        assert len(survey["screen"]["pictures"]) == 3
        assert survey["screen"]["hints"] == ["https://fonts.example/"]
        assert {"color-contrast", "image-alt"} <= set(violations(page, axe))
        assert len(unseen_stops(page, 1)) == 1
