"""The page of `jaxgpt-export serve`: what its files may hold, and what a browser shows of the answers."""

import asyncio
import fnmatch
import json
import math
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from jaxgpt_export.native.library import instruction_sets
from jaxgpt_export.serve.app import State, build_app
from jaxgpt_export.serve.guard import Rules
from jaxgpt_export.serve.metrics import Metrics
from serving import Served, serving
from tiny_artifacts import tiny_artifacts

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "export" / "jaxgpt_export" / "serve"
HTML, CSS, JS = ((FOLDER / f"playground.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
LEAST_CONTRAST = 4.5  # WCAG 2.2, 1.4.3, level AA
KEY = "a key"
WISH: dict[str, Any] = {"prompt": "def f(", "max_tokens": 20, "temperature": 0.8, "seed": 7, "logprobs": 5}


# ---- without a browser ----


def fetch(path: str) -> httpx.Response:
    """What a server answers that asks for a key and has no model yet."""
    app = build_app(State({}, 0.0, Metrics()), Rules("127.0.0.1", KEY, (), 1000))

    async def get() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
            return await client.get(f"http://127.0.0.1{path}")

    return asyncio.run(get())


def test_the_page_consists_of_files_that_the_server_gives_without_a_key() -> None:
    kinds = {"/": "text/html", "/playground.css": "text/css", "/playground.js": "text/javascript"}
    links = re.findall(r'(?:href|src)="([^"]*)"', HTML)
    assert {f"/{link}" for link in links if link != "data:,"} == set(kinds) - {"/"}
    for path, kind in kinds.items():
        answer = fetch(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.text == {"text/html": HTML, "text/css": CSS, "text/javascript": JS}[kind]
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    for name in ("playground.html", "playground.css", "playground.js"):
        assert any(fnmatch.fnmatch(f"serve/{name}", p) for p in patterns["package-data"]["jaxgpt_export"])


def test_the_page_needs_no_more_than_its_content_policy_allows() -> None:
    policy = fetch("/").headers["content-security-policy"]
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert allowed.pop("img-src") == "data:"  # the icon
    own = {"script-src", "style-src", "connect-src"}
    never = {"default-src", "base-uri", "form-action", "frame-ancestors"}
    assert allowed == dict.fromkeys(own, "'self'") | dict.fromkeys(never, "'none'")
    for content in (HTML, CSS, JS):
        assert not re.search(r"(?<!:)//\w|https?:|url\(|@import|\bimport\b", content)
    assert not re.search(r"<style|<script>|\sstyle=|\son\w+=", HTML)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", JS)


def test_every_name_that_the_script_uses_is_in_the_page() -> None:
    ids = re.findall(r'\bid="([\w-]+)"', HTML)
    assert len(ids) == len(set(ids))
    numbers = json.loads(re.search(r"const NUMBERS = (\[.*\]);", JS)[1])  # type: ignore[index]
    used = set(re.findall(r'\$\("([\w-]+)"\)', JS)) | set(numbers)
    assert len(used) > 15
    assert used <= set(ids)
    template = HTML[HTML.index("<template") :]
    for selector in re.findall(r'this\.find\("([^"]+)"\)', JS):
        name = selector.removeprefix(".")
        assert re.search(rf"<{name}\b" if name == selector else rf'class="[^"]*\b{name}\b', template), (
            selector
        )


def luminance(colour: str) -> float:
    """Of #rgb or #rrggbb; WCAG 2.2's definition."""
    digits = colour[1:] if len(colour) == 7 else "".join(digit * 2 for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_texts_have_contrast_in_both_schemes() -> None:
    schemes = [
        dict(re.findall(r"--([\w-]+): (#\w+)", part)) for part in re.findall(r":root \{(.*?)\}", CSS, re.S)
    ]
    assert len(schemes) == 2
    backgrounds = {"text": ("page", "card", "p1", "p2", "p3", "p4"), "dim": ("page", "card")}
    for scheme in schemes:
        pairs = [(text, back) for text, backs in backgrounds.items() for back in backs]
        for text, back in [*pairs, ("error", "page"), ("on-accent", "accent")]:
            dark, light = sorted((luminance(scheme[text]), luminance(scheme[back])))
            assert (light + 0.05) / (dark + 0.05) >= LEAST_CONTRAST, (text, back)


def test_a_token_without_a_place_to_break_breaks_wherever_it_is_shown() -> None:
    rules = dict(re.findall(r"^([^{}\n]+) \{([^}]*)\}", CSS, re.M))
    for shows_tokens in ("p", ".output", "#popup td"):  # "The models part at token 3: ..." is a p
        assert "overflow-wrap: anywhere" in rules[shows_tokens], shows_tokens


# ---- with one ----


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium; Debian's package of that name has it")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    if not instruction_sets():
        pytest.skip("no C++ compiler built the engine")
    made = tiny_artifacts(tmp_path_factory.mktemp("playground"))
    folders = [f"{name}={made[name]}" for name in ("int8-dynamic", "int8-weight-only")]
    with serving("--artifact", *folders, "--api-key", KEY) as served:
        yield served


@pytest.fixture(scope="module")
def page(browser: Any, server: Served) -> Any:
    """The page, with what it asked for and what went wrong in it."""
    page = browser.new_page()
    page.set_default_timeout(30_000)
    page.addresses, page.errors = [], []
    page.on("request", lambda request: page.addresses.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda said: page.errors.append(said.text) if "Policy" in said.text else None)
    page.goto(server.address)
    page.get_by_text("the API key is missing or wrong").wait_for()
    page.keyboard.type(KEY)  # the field has the focus
    page.keyboard.press("Tab")
    page.get_by_text("Ready.").wait_for()
    return page


def run(page: Any, **settings: object) -> list[Any]:
    """Fill in the form, run with the keyboard, return the panels."""
    fields = {
        "prompt": WISH["prompt"],
        "stops": "",
        **{name: WISH[name] for name in WISH if name != "logprobs"},
    }
    for name, value in {**fields, **settings}.items():
        page.fill(f"#{name}", str(value))
    page.keyboard.press("Control+Enter")
    page.locator("#status", has_text="Done.").or_(page.locator("#error:visible")).first.wait_for()
    return page.locator(".panel").all()


def in_text(panel: Any) -> str:
    """What a panel shows, without what it strikes out."""
    return panel.locator(".output").evaluate(
        "(output) => [...output.childNodes].map((token) => token.firstChild?.data ?? '').join('')"
    )


def answers(server: Served, **wish: object) -> list[dict[str, Any]]:
    """What the API says to the same, a choice a model."""
    body, headers = {**WISH, **wish}, {"Authorization": f"Bearer {KEY}"}
    names = ("int8-dynamic", "int8-weight-only")
    told = [server.post("/v1/completions", {**body, "model": name}, **headers) for name in names]
    return [answer.json()["choices"][0] for answer in told]


def level(logprob: float) -> str:
    return f"p{sum(math.exp(logprob) < least for least in (0.5, 0.2, 0.05, 0.01))}"


def test_both_models_texts_are_shown_coloured_by_log_probability(page: Any, server: Served) -> None:
    for panel, choice in zip(run(page), answers(server), strict=True):
        assert in_text(panel) == choice["text"]
        classes = [span.get_attribute("class").split()[1] for span in panel.locator(".token").all()]
        assert classes == [level(logprob) for logprob in choice["logprobs"]["token_logprobs"]]
        figures = panel.locator(".figures").text_content()
        tokens = len(choice["logprobs"]["tokens"])
        assert re.search(rf"[\d–] tokens/s.*\d ms to the first token{tokens} tokens", figures)
        assert "SHA-256" in panel.locator("details").text_content()


def test_the_first_difference_is_marked(page: Any, server: Served) -> None:
    def parting(seed: int) -> int:
        texts = [choice["logprobs"]["tokens"] for choice in answers(server, seed=seed)]
        return next((i for i, (ours, theirs) in enumerate(zip(*texts, strict=False)) if ours != theirs), 0)

    seed = next(seed for seed in range(50) if parting(seed))
    panels, place = run(page, seed=seed), parting(seed)
    assert f"part at token {place + 1}:" in page.locator("#parting").text_content()
    for panel in panels:
        marked = ["part" in span.get_attribute("class") for span in panel.locator(".token").all()]
        assert [i for i, mark in enumerate(marked) if mark] == [place]
    page.select_option("#second", "int8-dynamic")
    run(page, seed="")  # one is drawn, for both
    assert re.fullmatch(r"The first \d+ tokens are the same\.", page.locator("#parting").text_content())
    page.select_option("#second", "int8-weight-only")


def test_alternatives_are_shown_for_keyboard_and_pointer(page: Any, server: Served) -> None:
    first, _ = run(page)
    told = answers(server)[0]["logprobs"]
    first.locator(".output").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")

    def rows() -> list[str]:
        return [row.locator("td").first.text_content() for row in page.locator("#popup tr").all()]

    def expected(place: int) -> list[str]:
        top = told["top_logprobs"][place]
        return sorted(top, key=top.__getitem__, reverse=True)

    assert page.locator("#popup").is_visible()
    assert [json.loads(row) for row in rows()] == expected(1)
    assert json.loads(page.locator("#popup .chosen td").first.text_content()) == told["tokens"][1]
    page.keyboard.press("Escape")
    assert page.locator("#popup").is_hidden()
    first.locator(".token").nth(4).hover()
    assert [json.loads(row) for row in rows()] == expected(4)


def test_a_stop_text_is_struck_out(page: Any, server: Served) -> None:
    texts = {seed: answers(server, seed=seed)[0]["text"] for seed in range(5)}
    seed, text, stop = next(
        (seed, text, sign)
        for seed, text in texts.items()
        for sign in text[3:]
        if sign.isascii() and sign.isprintable() and sign not in " \\"
    )
    panel = run(page, stops=stop, seed=seed)[0]
    assert in_text(panel) == text[: text.index(stop)]
    assert panel.locator("s").last.text_content().startswith(stop)
    assert "then it ended" in panel.locator(".figures").text_content()


def test_the_api_s_error_is_shown_as_its_message(page: Any, server: Served) -> None:
    run(page, temperature=-1)
    body = {**WISH, "temperature": -1}
    error = server.post("/v1/completions", body, Authorization=f"Bearer {KEY}").json()["error"]
    assert page.locator("#error").text_content() == error["message"]
    run(page)
    assert page.locator("#error").is_hidden()


@pytest.mark.parametrize("how", ["Escape", "the button"])
def test_stop_ends_the_request(page: Any, how: str) -> None:
    ended = []
    page.on("requestfailed", lambda request: ended.append(request.failure))
    page.route("**/v1/completions", lambda route: None)  # an answer that does not come
    try:
        page.keyboard.press("Control+Enter")
        page.locator("#status", has_text="writes …").wait_for()
        if how == "Escape":
            page.keyboard.press("Escape")
        else:
            page.click("#stop")
        page.locator("#status", has_text="Stopped.").wait_for()
    finally:
        page.unroute("**/v1/completions")
    assert ended == ["net::ERR_ABORTED"]
    assert page.locator("#stop").is_disabled()


def test_it_fits_a_telephone_and_each_field_has_a_name(page: Any) -> None:
    for width, scheme in ((390, "dark"), (1280, "light")):
        page.set_viewport_size({"width": width, "height": 844})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("() => document.documentElement.scrollWidth") == width
    for field in page.locator("input, select, textarea").all():
        assert field.evaluate("(field) => field.labels.length") == 1
    assert page.locator("button").all_text_contents() == ["Run", "Stop"]


def test_nothing_was_fetched_from_elsewhere_and_no_script_failed(page: Any, server: Served) -> None:
    run(page)
    assert page.errors == []
    assert all(address.startswith(f"{server.address}/") for address in page.addresses)
