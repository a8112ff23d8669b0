"""Pages in a real browser: nothing is asked for, nothing complains, nothing hostile runs, and it is quick."""

from __future__ import annotations

import base64
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignctl.report import html
from alignctl.report.comparison import compare

MakeRun = Callable[..., Path]
HOSTILE = (
    "<script>window.broken = 1</script></script><img src=x onerror='window.broken = 1'>"
    "</style></title></textarea><!-- \x1b[31mred\x1b[0m \u202eodd\u2066 {{ 7 * 7 }} "
    '${7} " onmouseover="window.broken = 1'
)


@pytest.fixture
def hostile(make_run: MakeRun) -> Path:
    """A run whose every text wants to run as a script, or to turn the writing around."""
    run = make_run(
        "<b onclick=alert(1)>run",
        status="failed",
        why=HOSTILE,
        command=HOSTILE,
        gates={HOSTILE: {"verdict": '"><script>window.broken = 1</script>', "said": HOSTILE, "value": HOSTILE}},
        model={"name_or_path": HOSTILE, "adapter": HOSTILE},
        versions={HOSTILE: HOSTILE},
        memory={"planned_gib": 1, "lines": [{"name": HOSTILE, "bytes": 5}]},
    )
    for name in ("samples.jsonl", "ledger.json", "summary.json"):
        path = run / name
        path.write_text(_poisoned(path.read_text(encoding="utf-8"), jsonl=name.endswith("l")), encoding="utf-8")
    (run / "recipe.yaml").write_text(f"dpo: {{beta: 0.1}}\n# {HOSTILE[:-40]}\nmodel: {{name_or_path: 'x'}}\n")
    return run


def _poisoned(text: str, *, jsonl: bool) -> str:
    if jsonl:
        return "".join(json.dumps(_poison(json.loads(line))) + "\n" for line in text.splitlines())
    return json.dumps(_poison(json.loads(text)))


def _poison(value: Any, key: str = "") -> Any:
    """`value` with hostile words at the end of every text."""
    if isinstance(value, dict):
        return {name + (HOSTILE if "answer is empty" in name else ""): _poison(v, name) for name, v in value.items()}
    if isinstance(value, list):
        return [_poison(each) for each in value]
    return value + HOSTILE if isinstance(value, str) else value


def check(browser: Any, page: Path, width: int, *, dark: bool) -> None:
    """The page is loaded at once, alone, without a word on the console, and is no wider than the window."""
    assert min(browser.open(page, width, dark=dark) for _ in range(3)) < 1.0  # the machine has other work, too
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [page.resolve().as_uri()]
    assert browser.ask("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_finished_run(make_run: MakeRun, browser: Any, width: int, dark: bool) -> None:
    page = html.write(make_run(answers=12))
    check(browser, page, width, dark=dark)
    assert browser.ask("document.querySelector('.banner').className") == "banner good"
    assert browser.ask("[...document.querySelectorAll('figure svg')].every(s => s.getBBox().width > 200)")
    assert browser.ask("new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size") == browser.ask(
        "document.querySelectorAll('[id]').length"
    )
    columns = browser.ask("getComputedStyle(document.querySelector('.plots')).gridTemplateColumns.split(' ').length")
    assert columns == (2 if width > 600 else 1)


LIGHT = """(text => {
  const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
})"""


def contrast(browser: Any, what: str, on: str) -> float:
    """WCAG's contrast of the colour of `what` on the background of `on`."""
    front = browser.ask(f"{LIGHT}(getComputedStyle(document.querySelector({what!r})).color)")
    back = browser.ask(f"{LIGHT}(getComputedStyle(document.querySelector({on!r})).backgroundColor)")
    return (max(front, back) + 0.05) / (min(front, back) + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_colours_can_be_read(make_run: MakeRun, browser: Any, dark: bool) -> None:
    browser.open(html.write(make_run(answers=12)), dark=dark)
    places = [("h1", "body"), (".note", "body"), ("figcaption", "figure"), (".tag", "article"), ("pre .nt", "pre")]
    found = {what: contrast(browser, what, on) for what, on in places}
    for tone in ("good", "fair", "bad"):
        browser.ask(f"document.querySelector('.banner').className = 'banner {tone}'")
        found[tone] = contrast(browser, ".banner strong", ".banner")
        found[f"{tone} reason"] = contrast(browser, ".banner p", ".banner")
    assert {name: value for name, value in found.items() if value < 4.5} == {}


def test_search_and_filter(make_run: MakeRun, browser: Any) -> None:
    browser.open(html.write(make_run(answers=12)))

    def shown(search: str, choice: str) -> list[str]:
        browser.ask(
            f"(() => {{ const box = document.querySelector('[data-answers]'); const [i, s] = ['input', 'select']"
            f".map(n => box.querySelector(n)); i.value = {search!r}; s.value = {choice!r};"
            "i.dispatchEvent(new Event('input')); s.dispatchEvent(new Event('change')); })()"
        )
        found = browser.ask("[...document.querySelectorAll('article:not([hidden]) h4')].map(h => h.textContent)")
        return [heading.split(":")[0].removeprefix("Question ") for heading in found]

    assert shown("", "") == [str(i) for i in range(12)]
    assert shown("QUESTION 1:", "") == ["1"]
    assert shown("no such words", "") == []
    assert shown("", "longest") == [str(i) for i in range(11, -1, -1)]
    assert shown("", "changed") == ["1", "2", "4", "5", "7", "8", "10", "11"]
    assert shown("", "same") == ["0", "3", "6", "9"]
    assert shown("", "runs-on") == ["4", "9"]
    assert shown("question 4", "runs-on") == ["4"]
    assert browser.ask("document.querySelector('output').textContent") == "1 of 12"
    assert browser.complaints() == []


@pytest.mark.parametrize("width", [1280, 390])
def test_a_hostile_run_that_failed(hostile: Path, browser: Any, width: int) -> None:
    page = html.write(hostile)
    check(browser, page, width, dark=False)
    assert browser.ask("window.broken") is None
    assert browser.ask("document.scripts.length") == 1
    assert browser.ask("document.querySelectorAll('img, iframe, object, link, [onclick], [onmouseover]').length") == 0
    assert browser.ask("document.querySelector('h1').textContent") == "<b onclick=alert(1)>run"
    assert "<script>window.broken = 1</script>" in browser.ask("document.querySelector('.banner p').textContent")
    assert browser.ask("document.querySelector('.banner').className") == "banner bad"
    text = page.read_text(encoding="utf-8")
    assert not {"\x1b", "\u202e", "\u2066"} & set(text)


def test_what_a_page_may_do_is_nothing(make_run: MakeRun, browser: Any) -> None:
    """The policy holds: a script that got in would not run, and nothing is fetched."""
    page = html.write(make_run())
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("</main>", "<script>window.broken = 1</script><img src='file:///x.png'></main>"))
    browser.open(page)
    assert browser.ask("window.broken") is None
    assert len([line for line in browser.complaints() if "Content Security Policy" in line]) == 2


def test_runs_beside_each_other(make_run: MakeRun, hostile: Path, tmp_path: Path, browser: Any) -> None:
    found = compare([make_run("dpo"), make_run("orpo", "orpo"), hostile])
    page = tmp_path / "compare.html"
    page.write_text(html.comparison(found), encoding="utf-8")
    for width in (1280, 390):
        check(browser, page, width, dark=False)
    assert browser.ask("window.broken") is None
    assert browser.ask("document.querySelectorAll('article').length") == 0
    assert browser.ask("document.querySelectorAll('.plots figure').length") >= 5


def test_it_prints_in_the_light_and_whole(make_run: MakeRun, browser: Any) -> None:
    page = html.write(make_run())
    browser.open(page, dark=True)
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser("Emulation.setEmulatedMedia", media="print", features=features)
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.ask("getComputedStyle(document.querySelector('nav')).display") == "none"
    browser("Emulation.setEmulatedMedia", media="", features=features)
    printed = base64.b64decode(browser("Page.printToPDF")["data"])
    assert printed.startswith(b"%PDF")
    assert browser.ask("[...document.querySelectorAll('main > details')].every(d => d.open)")


def test_a_large_run_is_small_and_quick(make_run: MakeRun, browser: Any) -> None:
    """5,000 log lines and 500 long answers: below 3 MB, opened within a second, made in five of the processor."""
    run = make_run(steps=5000, answers=500, words=250)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "alignctl", "report", str(run)], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    page = run / html.NAME
    assert 1_000_000 < page.stat().st_size < 3_000_000
    check(browser, page, 1280, dark=False)
