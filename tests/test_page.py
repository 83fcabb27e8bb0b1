"""The page at GET /, as people use it: in Chromium, served by the app over plain functions."""

import asyncio
import csv
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import script
from starlette.responses import JSONResponse

from workloads import api, openapi, page, protocols
from workloads.config import TargetServe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium is installed"),
]
shots = script("screenshots")
HOSTILE = "<img src=x onerror=\"document.title='taken'\">"
LABELS = ["long", "short", HOSTILE, *(f"label {i}" for i in range(9))]
CARD = f"---\nwidget:\n  - text: 'a plain example, isn''t it'\n---\n# Card\n{HOSTILE}\n"


async def classify(texts: list[str], parameters: protocols.Parameters) -> protocols.Scored:
    """Long or short; what is over 100 characters is cut; some texts take a while."""
    await asyncio.sleep(0.3 * ("slow" in texts[0]))
    rows = []
    for text in texts:
        best = ["long", "short"] if len(text) > 20 else ["short", "long"]
        scores = zip([*best, *LABELS[2:]], [0.75, 0.2, *[0.005] * 10], strict=True)
        rows.append([{"label": k, "score": v} for k, v in scores][: parameters.top_k])
    return protocols.Scored(rows, [i for i, text in enumerate(texts) if len(text) > 100])


async def explain(text: str, asked: protocols.ExplainParameters) -> protocols.Explained:
    """Good words add, bad ones take away; each letter is a token, and punctuation a word."""
    found = await classify([text], protocols.Parameters())
    tokens = []
    for word, match in enumerate(re.finditer(r"\S+", text)):
        adds = {"good": 1.0, "bad": -0.5}.get(match[0], 0.01) / len(match[0])
        for at in range(*match.span()):
            place = {"token": text[at], "word": word, "start": at, "end": at + 1}
            tokens.append({**place, "score": adds})
    told = {"label": found.scores[0][0]["label"], "score": 0.75, "tokens": tokens}
    cut = len(text) > 100
    return protocols.Explained({**openapi.EXPLAINED, **told, "truncated": cut}, [0] * cut)


async def embed(given: Any) -> protocols.Embedded:
    """By the first letter: the same one gives the same vector."""
    vectors = [np.eye(8, dtype="float32")[ord(text[0]) % 8] for text in given]
    return protocols.Embedded(vectors, [], len(given))


def app(
    labels: list[str] = LABELS,
    max_inputs: int = 100,
    max_body_bytes: int = 3000,
    classify: Any = classify,
    key: str | None = None,
    explain: Any = explain,
    **limits: Any,
) -> Any:
    """The server's app, over those functions."""
    model = protocols.Model("my model", labels, 8, max_inputs, classify, embed)
    model = model._replace(explain=explain)
    about = {"model": model.name, "labels": labels, "max_tokens": 32, "dimensions": 8}
    about |= {"engine": "made-up", "notes": {"eval_accuracy": 0.875, "run": HOSTILE}, "card": CARD}
    hashes = [hashlib.sha256(key.encode()).hexdigest()] if key else []
    limits = {"max_body_bytes": max_body_bytes, **limits}
    return api.make_app(model, about, TargetServe(**limits), hashes)


def before(app: Any, look: Callable[[Any], JSONResponse | None]) -> Any:
    """The app, behind something that may answer in its place."""

    async def front(scope: Any, receive: Any, send: Any) -> None:
        await (look(scope) or app)(scope, receive, send)

    return front


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with shots.chromium() as found:
        yield found


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page of an app; at the end nothing may have been complained of on its console, or
    asked of anybody else."""
    contexts, servers, said, asked = [], [], [], []

    def go(served: Any = None, ready: str = "#facts dt", said_too: str = "", **how: Any) -> Any:
        servers.append(shots.serving(served or app()))
        url = servers[-1].__enter__()
        contexts.append(browser.new_context(reduced_motion="reduce", **how))
        opened = contexts[-1].new_page()
        opened.set_default_timeout(5000)
        opened.on("console", lambda m: said_too and said_too in m.text or said.append(m.text))
        opened.on("pageerror", lambda error: said.append(str(error)))
        opened.on(
            "request", lambda r: r.url.startswith((url, "data:", "blob:")) or asked.append(r.url)
        )
        opened.goto(url)
        opened.locator(ready).first.wait_for()
        return opened

    yield go
    for one in contexts:
        one.close()
    for server in servers:
        server.__exit__(None, None, None)
    assert (said, asked) == ([], [])


def classified(opened: Any, text: str) -> list[str]:
    """The lines of the answer to a text."""
    opened.locator("#text").fill(text)
    opened.get_by_role("button", name="Classify", exact=True).click()
    opened.get_by_text("Answered in").wait_for()
    return opened.locator("#bars li").all_inner_texts()


def all_of(opened: Any, *texts: str) -> None:
    """Has many texts classified."""
    opened.get_by_label("Many texts").check()
    opened.locator("#lines").fill("\n".join(texts))
    opened.get_by_role("button", name="Classify all").click()


def choose(opened: Any, name: str, content: str) -> None:
    """Chooses a file of texts."""
    opened.get_by_label("Many texts").check()
    file = {"name": name, "mimeType": "text/plain", "buffer": content.encode()}
    opened.get_by_label("Or from a file").set_input_files(file)
    opened.get_by_text(f"of {name}").wait_for()


def downloaded(opened: Any) -> tuple[bytes, list[list[str]]]:
    """The CSV file and its rows."""
    with opened.expect_download() as download:
        opened.get_by_role("button", name="Download CSV").click()
    content = Path(download.value.path()).read_bytes()
    return content, list(csv.reader(content.decode("utf-8-sig").splitlines(keepends=True)))


def test_a_text_gets_bars_in_order_and_the_time_it_took(visit: Any) -> None:
    opened = visit()
    bars = classified(opened, "hello")
    assert [bar.split() for bar in bars[:2]] == [["short", "75.0%"], ["long", "20.0%"]]
    assert len(bars) == 10
    widths = opened.locator(".bar").evaluate_all("bars => bars.map((b) => b.style.width)")
    assert widths[:3] == ["75%", "20%", "0.5%"]
    status = opened.locator("#status").inner_text()
    assert status.startswith("short, 75.0%. Answered in ")
    assert status.endswith((" ms.", " s."))
    opened.get_by_role("button", name="Show all 12 labels").click()
    assert opened.locator("#bars li").count() == 12


def test_a_text_that_was_cut_is_said_to_be(visit: Any) -> None:
    opened = visit()
    classified(opened, "long " * 30)
    assert "A text was cut: the model reads 32 tokens" in opened.locator("#status").inner_text()


def test_it_can_be_used_by_keyboard_alone(visit: Any) -> None:
    opened = visit()
    focus = "[document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle]"
    opened.keyboard.press("Tab")  # the switch
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("Tab")
    assert opened.evaluate(focus) == ["lines", "solid"]
    opened.keyboard.type("one\ntwo")
    opened.keyboard.press("Control+Enter")
    opened.get_by_text("All 2 texts").wait_for()
    for _ in range(3):
        opened.keyboard.press("Tab")
    assert opened.evaluate(focus) == ["download", "solid"]
    opened.keyboard.press("Shift+Tab")
    assert opened.evaluate(focus) == ["start", "solid"]


def test_ctrl_enter_classifies(visit: Any) -> None:
    opened = visit()
    opened.locator("#text").press_sequentially("hi")
    opened.keyboard.press("Control+Enter")
    opened.get_by_text("Answered in").wait_for()
    assert opened.evaluate("document.activeElement.id") == "text"


def test_many_texts_become_a_table_and_a_csv_file_that_no_spreadsheet_runs(visit: Any) -> None:
    given = ['say "hi", twice', "=1+1", "+1", "-1", "@a", "\tb", "naïve 🙂 text", "", "  ", "ok"]
    opened = visit()
    all_of(opened, *given)
    opened.get_by_text("All 8 texts").wait_for()
    rows = opened.locator("#rows tr")
    assert rows.nth(6).inner_text().split("\t") == ["naïve 🙂 text", "short", "75.0%"]
    content, table = downloaded(opened)
    assert content.startswith(
        b"\xef\xbb\xbftext,label,score\r\n" + b'"say ""hi"", twice",short,0.75\r\n'
    )
    texts = ['say "hi", twice', "'=1+1", "'+1", "'-1", "'@a", "'\tb", "naïve 🙂 text", "ok"]
    assert table[1:] == [[text, "short", "0.75"] for text in texts]


def test_thousands_of_texts_go_in_parts_and_200_are_shown(visit: Any) -> None:
    sizes: list[int] = []

    def look(scope: Any) -> None:
        if scope["method"] == "POST":
            sizes.append(int(dict(scope["headers"])[b"content-length"]))

    opened = visit(before(app(), look))
    texts = [f"text {i} " + "é" * (i % 40) for i in range(2000)]
    choose(opened, "many.txt", "\n".join([*texts, "z" * 3000]))
    opened.locator("#lines").press("Control+Enter")
    opened.get_by_text("All 2,001 texts").wait_for()
    assert opened.locator("#rows tr").count() == 200
    assert "The first 200 are shown" in opened.locator("#status").inner_text()
    assert max(sizes) <= 3000
    assert len(sizes) < 60
    _, table = downloaded(opened)
    assert [row[0] for row in table[1:-1]] == texts
    assert table[-1] == ["z" * 3000, "", ""]


def test_stop_keeps_what_is_done(visit: Any) -> None:
    opened = visit(app(max_inputs=1))
    all_of(opened, "a", "b", *["slow"] * 50)
    opened.locator("#rows tr").nth(2).wait_for()
    opened.get_by_role("button", name="Stop").click()
    opened.get_by_text("Stopped after").wait_for()
    done = opened.locator("#rows tr").count()
    assert 3 <= done < 50
    assert len(downloaded(opened)[1]) == 1 + done


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.txt", "\ufeffone\r\n\r\ntwo, three\n", ["one", "two, three"]),
        ("a.csv", 'id,Text\n1,"a ""b"", c"\n2,"d\ne"\n', ['a "b", c', "d e"]),
        ("a.csv", 'id;review\r\n1;"so good; yes"\r\n2;bad\r\n', ["so good; yes", "bad"]),
        ("a.csv", "only\ntexts\n", ["only", "texts"]),
        ("a.csv", "\n\ntext;label\na, b;c\n", ["a, b"]),
    ],
)
def test_a_file_gives_its_texts(visit: Any, name: str, content: str, lines: list[str]) -> None:
    opened = visit()
    choose(opened, name, content)
    assert opened.locator("#status").inner_text().startswith(f"{len(lines)} texts")
    assert opened.locator("#lines").input_value().split("\n") == lines


def test_a_table_whose_commas_are_not_quoted_is_refused(visit: Any) -> None:
    opened = visit()
    opened.get_by_label("Many texts").check()
    file = {"name": "a.csv", "mimeType": "text/csv", "buffer": b"text\ngood, really\nbad\n"}
    opened.get_by_label("Or from a file").set_input_files(file)
    opened.get_by_role("alert").filter(has_text="more cells than the first one").wait_for()
    assert opened.locator("#lines").input_value() == ""


def test_a_file_that_is_chosen_meanwhile_stops_what_is_done(visit: Any) -> None:
    opened = visit(app(max_inputs=1))
    all_of(opened, "a", *["slow"] * 50)
    opened.locator("#rows tr").nth(1).wait_for()
    choose(opened, "b.txt", "one\ntwo\n")
    assert not opened.get_by_role("button", name="Stop").is_visible()
    assert not opened.locator("progress").is_visible()
    assert len(downloaded(opened)[1]) >= 2


def test_no_request_has_more_tokens_than_one_may_have(visit: Any) -> None:
    sizes: list[int] = []

    async def counted(texts: list[str], parameters: protocols.Parameters) -> Any:
        sizes.append(len(texts))
        return await classify(texts, parameters)

    opened = visit(app(classify=counted, max_request_tokens=100))  # 32 a text at most
    all_of(opened, *["x"] * 10)
    opened.get_by_text("All 10 texts").wait_for()
    assert sizes == [3, 3, 3, 1]


def test_a_key_is_asked_for_sent_and_shown_nowhere(visit: Any) -> None:
    sent: list[str] = []

    def look(scope: Any) -> JSONResponse | None:
        sent.append(dict(scope["headers"]).get(b"authorization", b"").decode())
        return None

    opened = visit(before(app(key="s3cret"), look), ready="#key-form", said_too="401")
    assert "Who runs it can give you one: put it here" in opened.locator("#key-why").inner_text()
    for key in ("wrong", "s3cret"):
        opened.get_by_label("API key").fill(key)
        opened.keyboard.press("Enter")
    opened.locator("#facts dt").first.wait_for()
    assert classified(opened, "hi")
    right = "Bearer s3cret"
    assert sent == ["", "", "Bearer wrong", right, right]
    for language in ("curl", "Python", "Hugging Face", "OpenAI", "Open Inference"):
        opened.get_by_label(language, exact=True).check()
        assert "WORKLOADS_API_KEY" in opened.locator("#code").inner_text()
        assert "s3cret" not in opened.content()
    assert opened.locator("#key").input_value() == ""


def test_a_busy_server_is_asked_again(visit: Any) -> None:
    refused: list[str] = []

    def look(scope: Any) -> JSONResponse | None:
        if scope["method"] == "POST" and len(refused) < 2:
            refused.append(scope["path"])
            return JSONResponse({"error": "busy"}, 429, {"Retry-After": "1"})
        return None

    opened = visit(before(app(), look), said_too="429")
    all_of(opened, "a", "b")
    opened.get_by_text("trying again in 1 s").wait_for()
    opened.get_by_text("All 2 texts").wait_for()
    assert len(refused) == 2


def test_the_reason_of_a_refusal_is_told(visit: Any) -> None:
    opened = visit(app(max_body_bytes=100), said_too="413")
    opened.locator("#text").fill("x" * 200)
    opened.keyboard.press("Control+Enter")
    opened.get_by_role("alert").filter(has_text="the body is over 100 bytes").wait_for()


def explained(opened: Any, text: str) -> list[list[str]]:
    """The marked words with the side that they are on."""
    classified(opened, text)
    opened.get_by_role("button", name="Why?").click()
    opened.get_by_text("Explained in").wait_for()
    marks = "marks => marks.map((m) => [m.textContent, m.className])"
    return opened.locator("#marked mark").evaluate_all(marks)


def test_why_marks_the_words_that_add_and_take(visit: Any) -> None:
    opened = visit()
    text = "🎬 a good 👩‍👧 film,\nbut bad ..."
    assert explained(opened, text) == [["good", "for"], ["bad", "against"]]
    assert opened.locator("#marked").evaluate("p => p.textContent") == text
    style = "m => [getComputedStyle(m).textDecorationStyle, m.title]"
    assert opened.locator("#marked .for").evaluate(style) == ["solid", "+1.000"]
    assert opened.locator("#marked .against").evaluate(style) == ["dashed", "−0.500"]
    said = opened.locator("#why").inner_text()
    assert "Why long?" in said
    assert "captum" in said
    assert "50 steps; completeness gap 0.000020 (< 0.1%)" in said
    opened.get_by_text("In numbers").click()
    rows = opened.get_by_label("Words in numbers").locator("tr").all_inner_texts()
    assert [row.split("\t") for row in rows[:2]] == [
        ["good", "for", "+1.000"],
        ["bad", "against", "−0.500"],
    ]
    assert len(rows) == 8


def test_why_is_of_the_text_that_was_answered_and_goes_with_it(visit: Any) -> None:
    opened = visit()
    button = opened.get_by_role("button", name="Why?")
    assert not button.is_visible()
    classified(opened, "a good one")
    opened.locator("#text").fill("something else")
    button.click()
    opened.get_by_text("Explained in").wait_for()
    assert opened.locator("#marked").text_content() == "a good one"
    classified(opened, "long good " * 12)
    assert opened.locator("#marked").count() == 0
    button.click()
    opened.get_by_text("A text was cut").wait_for()
    all_of(opened, "a")
    assert not button.is_visible()


def test_why_works_by_keyboard_and_speaks(visit: Any) -> None:
    opened = visit()
    classified(opened, "good")
    for _ in range(20):
        opened.keyboard.press("Tab")
        if opened.evaluate("document.activeElement.id") == "why-button":
            break
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert opened.evaluate(outline) == "solid"
    opened.keyboard.press("Enter")
    opened.get_by_role("status").filter(has_text="Explained in").wait_for()
    assert opened.evaluate("document.activeElement.id") == "why-button"
    opened.keyboard.press("Tab")
    opened.keyboard.press("Enter")
    assert opened.get_by_label("Words in numbers").is_visible()


def test_why_not_is_told_and_the_answer_stays(visit: Any) -> None:
    async def none(*_: Any) -> Any:
        raise protocols.Refusal(400, "this package has no torch")

    opened = visit(app(explain=none), said_too="400")
    classified(opened, "good")
    opened.get_by_role("button", name="Why?").click()
    opened.get_by_role("alert").filter(has_text="has no torch").wait_for()
    assert opened.locator("#bars li").count() == 10


def test_a_server_that_is_gone_is_told(visit: Any) -> None:
    opened = visit(said_too="ERR_INTERNET_DISCONNECTED")
    classified(opened, "hello")
    opened.context.set_offline(True)
    opened.locator("#text").press("Control+Enter")
    opened.get_by_role("alert").filter(has_text="The server does not answer").wait_for()
    assert opened.locator("#bars li").count() == 0


def test_hostile_words_are_shown_as_words(visit: Any) -> None:
    opened = visit()
    explained(opened, HOSTILE)
    assert "onerror=" in opened.locator("#marked").text_content()
    opened.get_by_text("In numbers").click()
    all_of(opened, HOSTILE)
    opened.get_by_text("All 1 texts").wait_for()
    opened.get_by_text("Model card").click()
    for part in ("#bars", "#labels", "#facts", "#card", "#rows", "#code"):
        assert "onerror=" in opened.locator(part).text_content()
    assert opened.locator("img").count() == 0
    assert opened.title() == "my model · workloads"


def test_the_policy_forbids_what_is_not_the_pages_own(visit: Any) -> None:
    opened = visit(said_too="Content Security Policy")
    opened.evaluate("""() => {
      const script = document.createElement("script");
      script.textContent = "document.title = 'taken'";
      document.body.append(script);
    }""")
    assert opened.title() == "my model · workloads"
    assert opened.evaluate("fetch('https://example.com').catch(() => 'no')") == "no"
    assert "unsafe" not in page.load()[1]["content-security-policy"]


def test_what_the_model_is_stands_there(visit: Any) -> None:
    opened = visit()
    about = opened.locator("#about").inner_text()
    for part in ("Accuracy\n87.5%", "made-up", "32 tokens", "12 labels", "label 8"):
        assert part in about
    opened.get_by_role("button", name="a plain example").click()
    opened.get_by_text("Answered in").wait_for()
    assert opened.locator("#text").input_value() == "a plain example, isn't it"


TRICKY = 'it\'s "$HOME" `id` \\n !x\nüñ'


@pytest.mark.parametrize("language", ["curl", "Python", "Hugging Face", "Open Inference"])
def test_the_lines_to_copy_work(visit: Any, language: str) -> None:
    asked: list[str] = []

    async def noting(texts: list[str], parameters: protocols.Parameters) -> protocols.Scored:
        asked.extend(texts)
        return await classify(texts, parameters)

    opened = visit(app(classify=noting))
    opened.locator("#text").fill(TRICKY)
    opened.get_by_label(language, exact=True).check()
    lines = opened.locator("#code").inner_text()
    shell = ["bash", "-c"] if lines.startswith("curl ") else [sys.executable, "-c"]
    online = os.environ | {"HF_HUB_OFFLINE": "0"}  # else its client refuses to ask anybody
    done = subprocess.run([*shell, lines], capture_output=True, text=True, env=online, timeout=60)
    assert "long" in done.stdout, done.stderr
    assert asked == [TRICKY]


def test_the_copy_button_copies_without_the_clipboard_of_https(visit: Any) -> None:
    opened = visit(permissions=["clipboard-read"])
    opened.evaluate("Object.defineProperty(navigator, 'clipboard', {get: () => undefined})")
    opened.get_by_role("button", name="Copy").click()
    opened.get_by_text("Copied.").wait_for()
    lines = opened.locator("#code").inner_text()
    opened.locator("#text").press("Control+v")
    assert opened.locator("#text").input_value() == lines


def test_a_model_without_labels_compares_texts(visit: Any) -> None:
    opened = visit(app(labels=[]))
    assert not opened.locator("#modes").is_visible()
    opened.get_by_role("textbox", name="Your texts, one a line").fill("apple\navocado\nbanana")
    opened.get_by_role("button", name="Embed").click()
    opened.get_by_text("8 values a text").wait_for()
    first = opened.get_by_label("Embeddings").locator("tr").first.inner_text()
    assert first.startswith("apple\t0.0000, 1.0000")
    table = opened.get_by_label("Similarities").locator("tr").all_inner_texts()
    assert [row.split("\t") for row in table[1:]] == [
        ["1. apple", "1.00", "1.00", "0.00"],
        ["2. avocado", "1.00", "1.00", "0.00"],
        ["3. banana", "0.00", "0.00", "1.00"],
    ]


@pytest.mark.parametrize("labels", [LABELS, []])
def test_a_phone_needs_no_sideways_scrolling(visit: Any, labels: list[str]) -> None:
    opened = visit(app(labels), viewport={"width": 320, "height": 600})
    wide = "document.documentElement.scrollWidth"
    opened.locator("#text").fill("\n".join(["w" * 60] * 20))
    opened.keyboard.press("Control+Enter")
    opened.get_by_text("Answered in").wait_for()
    assert opened.evaluate(wide) == 320
    if labels:
        explained(opened, "w" * 300 + " good " * 50)
        opened.get_by_text("In numbers").click()
        assert opened.evaluate(wide) == 320
        all_of(opened, "w" * 60, "a b")
        opened.get_by_text("All 2 texts").wait_for()
        assert opened.evaluate(wide) == 320


# The least contrast of all text that is seen, by WCAG 2.2, with the text it is of.
CONTRAST = """() => {
  const numbers = (color) => color.match(/[\\d.]+/g)
    .map((v, i) => (color.startsWith("color(") && i < 3 ? 255 * v : Number(v)));
  const light = (color) => {
    const [r, g, b] = numbers(color).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    const color = getComputedStyle(element).backgroundColor;
    return numbers(color)[3] === 0 ? ground(element.parentElement) : color;
  };
  let least = [99, ""];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility() || element.closest("script")) continue;
    const pair = [light(getComputedStyle(element).color), light(ground(element))];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (ratio < least[0]) least = [ratio, node.data];
  }
  return least;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(visit: Any, scheme: str) -> None:
    opened = visit(app(max_body_bytes=500), color_scheme=scheme, said_too="413")
    explained(opened, "hello good words, bad words")
    opened.get_by_text("In numbers").click()
    opened.get_by_text("Model card").click()
    one = opened.evaluate(CONTRAST)
    all_of(opened, "a")
    opened.get_by_text("All 1 texts").wait_for()
    many = opened.evaluate(CONTRAST)
    opened.get_by_label("One text").check()
    opened.locator("#text").fill("x" * 600)
    opened.keyboard.press("Control+Enter")
    opened.get_by_role("alert").filter(has_text="over").wait_for()
    refused = opened.evaluate(CONTRAST)
    assert min(one, many, refused) >= [4.5, ""]
    dark = opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 22, 20)"
    assert dark == (scheme == "dark")


def test_info_has_what_readyz_leaves_out() -> None:
    from fastapi.testclient import TestClient

    with TestClient(app()) as client:
        info, ready = client.get("/info").json(), client.get("/readyz").json()
    most = {"max_inputs": 100, "max_body_bytes": 3000, "max_request_tokens": 65536}
    assert info["limits"] == most
    assert info["card"] == CARD
    assert info["notes"]["eval_accuracy"] == 0.875
    assert ready == {"status": "ready"} | {k: info[k] for k in ready if k != "status"}
    assert info.keys() - ready.keys() == {"limits", "notes", "card"}


def test_only_notes_that_json_and_the_page_can_hold_are_told() -> None:
    from workloads.replica import plain

    notes = {"run": "r", "loss": float("nan"), "task": {"a": 1}, "files": ["a"], "many": [1] * 21}
    assert plain(notes) == {"run": "r", "files": ["a"]}


def test_the_card_is_the_start_of_the_model_folders_readme(tmp_path: Path) -> None:
    from workloads.engine import read_info

    (tmp_path / "config.json").write_text('{"architectures": ["BertForSequenceClassification"]}')
    assert read_info(tmp_path, "m").card is None
    (tmp_path / "README.md").write_text("# Hi " + "x" * 60_000)
    assert read_info(tmp_path, "m").card == "# Hi " + "x" * 49_995
