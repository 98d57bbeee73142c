"""The page in a real browser: no request leaves, no error, every switch does what it says, by mouse and by keyboard.

Needs `pip install 'rmprune[browser]'` and an installed chromium (Debian: `apt-get install chromium`); skipped without.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import page_records
import pytest

from rmprune.report.gather import gather
from rmprune.report.page import page as page_of
from rmprune.report.payload import payload
from rmprune.report.tables import frame_of

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install 'rmprune[browser]'"
)
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no chromium is installed"),
    pytest.mark.xdist_group("browser"),  # one browser for all
]
expect = playwright.expect


def opens(request: Any) -> bool:
    """Whether a request is the page itself, from the disk."""
    return bool(request.resource_type == "document" and request.url.startswith("file:"))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str, list[str]]]:
    """A browser's page, the address of the report, and what went wrong while it was used: requests, errors."""
    folder = tmp_path_factory.mktemp("page")
    records, left_out = gather([page_records.write_runs(folder / "runs"), folder / "missing"])
    (folder / "index.html").write_text(page_of(payload(frame_of(records), records, left_out, "report runs")))
    wrong: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
        page.set_default_timeout(5000)
        address = (folder / "index.html").as_uri()
        page.on("request", lambda request: None if opens(request) else wrong.append(request.url))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        yield page, address, wrong
        browser.close()


@pytest.fixture
def page(opened: tuple[Any, str, list[str]]) -> Iterator[Any]:
    """The page as it opens; nothing may have gone wrong when the test is done."""
    page, address, wrong = opened
    wrong.clear()
    page.set_viewport_size({"width": 1280, "height": 900})
    page.emulate_media(media="screen", color_scheme="light")
    page.goto(address)
    page.wait_for_selector("html[data-ready]")
    yield page
    assert not wrong and page.evaluate("window.hacked") is None
    assert page.evaluate("performance.getEntriesByType('resource').length") == 0


def test_a_record_of_little_is_shown(page: Any, tmp_path: Path) -> None:
    """Nothing measured, nothing removed, no more than two networks: as `train` may leave it."""
    record = page_records.record(0, 0.5, ())
    record["removal"] = None
    for name in ("original", "plain"):
        record[name] = record[name] | {"latency": []}
    place = tmp_path / "little.html"
    records = {Path("runs/little/record.json"): record}
    place.write_text(page_of(payload(frame_of(records), records, [], "report")))
    page.goto(place.as_uri())
    page.wait_for_selector("html[data-ready]")
    expect(page.locator("#chart")).to_contain_text("Nothing to draw")
    expect(page.locator("#drawing")).to_contain_text("16 → 24")
    assert page.locator("#exactness").is_hidden() and page.locator("#left-out").is_hidden()


def dots(page: Any) -> list[str]:
    """What the points of the chart say of themselves: "rm, macs 0.5: 96.50 %, 1.04 ms"."""
    return [dot.get_attribute("aria-label") for dot in page.query_selector_all("#chart .dot")]


def time_of(page: Any, method: str = "dense") -> float:
    found = [re.search(r"([\d.]+) ms", said) for said in dots(page) if said.startswith(f"{method}:")]
    return float(found[0].group(1)) if found and found[0] else float("nan")


def switch(page: Any, name: str, value: str) -> None:
    page.locator(f'#controls input[name="{name}"][value="{value}"]').check(force=True)


def axis_label(page: Any) -> str:
    return str(page.locator("#chart [aria-label='x-axis label']").text_content())


def test_eight_methods_are_on_and_each_goes_on_and_off(page: Any) -> None:
    methods = page.locator("#methods button[aria-pressed]")
    assert methods.count() == 11
    assert page.locator("#methods button[aria-pressed=true]").count() == 8
    assert len({said.split(":")[0].split(",")[0] for said in dots(page)}) == 8
    page.get_by_role("button", name="coupled", exact=True).first.click()
    assert not [said for said in dots(page) if said.startswith("coupled,")]
    assert "coupled" not in page.locator("#table tbody td:first-child").all_text_contents()
    assert page.evaluate("document.activeElement.dataset.method") == "coupled"  # the keyboard stays where it was
    page.keyboard.press("Enter")
    assert [said for said in dots(page) if said.startswith("coupled,")]
    page.get_by_role("button", name="all", exact=True).click()
    assert page.locator("#methods button[aria-pressed=true]").count() == 11
    page.get_by_role("button", name="none", exact=True).click()
    expect(page.locator("#chart")).to_contain_text("switch a method on")
    page.get_by_role("button", name="first eight").click()
    assert page.locator("#methods button[aria-pressed=true]").count() == 8
    looks = page.eval_on_selector_all(
        "#methods .marker path", "all => all.map(p => p.getAttribute('d') + getComputedStyle(p).fill)"
    )
    assert len(set(looks)) == 11


def test_the_switches_of_the_place(page: Any) -> None:
    assert time_of(page) == pytest.approx(2.0)  # eager, one thread, batch 1
    switch(page, "backend", "onnxruntime")
    assert time_of(page) == pytest.approx(1.0)
    switch(page, "threads", "2")
    assert time_of(page) == pytest.approx(0.5)
    switch(page, "batch_size", "32")
    assert time_of(page) == pytest.approx(0.5 * 32**0.9, rel=0.01)
    assert "batch of 32" in axis_label(page)
    page.locator('#controls input[name="backend"]:checked').focus()
    page.keyboard.press("ArrowLeft")
    assert time_of(page) == pytest.approx(32**0.9, rel=0.01)
    assert page.evaluate("document.activeElement.value") == "eager"


def test_a_number_format_is_drawn_at_its_own_accuracy(page: Any, tmp_path: Path) -> None:
    assert page.locator('#controls input[name="number_format"]').count() == 0  # all is float32
    record = page_records.record(0, 0.5, ("rm",))
    page_records.add_int8(record["original"])
    file, records = tmp_path / "int8.html", {Path("runs/int8/record.json"): record}
    file.write_text(page_of(payload(frame_of(records), records, [], "report")))
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready]")
    assert [said.split()[1] for said in dots(page) if said.startswith("dense:")] == ["97.00"]
    switch(page, "number_format", "int8")
    assert [said.split()[1] for said in dots(page)] == ["72.00"]
    assert page.locator('#controls input[name="backend"]:checked').input_value() == "onnxruntime"


def test_the_switches_of_the_chart(page: Any) -> None:
    for value, label in (
        ("ratio", "dense network = 1"),
        ("speed", "images per second"),
        ("macs", "multiply-accumulates"),
        ("params", "parameters"),
        ("memory", "bytes of float32 activations"),
        ("time", "measured time for a batch of 1 (ms)"),
    ):
        page.locator("#axis").select_option(value)
        assert label in axis_label(page)
    place = page.locator("#chart .dot").nth(4).bounding_box()
    switch(page, "scale", "linear")
    assert page.locator("#chart .dot").nth(4).bounding_box() != place
    lines = page.locator("#chart g[aria-label=line]").count()
    page.locator("#front").select_option("none")
    assert page.locator("#chart g[aria-label=line]").count() == lines - 1
    page.locator("#front").select_option("each")
    assert page.locator("#chart g[aria-label=line]").count() == 8
    page.locator("#group").select_option("1")
    assert page.locator("#methods button[aria-pressed]").count() == 4  # dense, plain, rm and the hostile one
    page.get_by_role("button", name="all", exact=True).click()
    assert any(said.startswith(f"{page_records.HOSTILE},") for said in dots(page))
    assert page_records.HOSTILE in " ".join(page.locator("#table td").all_text_contents())


def test_the_table_sorts(page: Any) -> None:
    def column(number: int) -> list[float]:
        texts = page.locator(f"#table tbody td:nth-child({number})").all_text_contents()
        return [float(text.split()[0].replace("x", "")) for text in texts]

    assert column(6) == sorted(column(6))
    header = page.locator("#table th").nth(2)
    header.get_by_role("button").click()
    assert column(3) == sorted(column(3)) and header.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Enter")
    assert column(3) == sorted(column(3), reverse=True) and header.get_attribute("aria-sort") == "descending"
    page.locator("#table tbody button").first.click()
    expect(page.locator("#details h3")).to_contain_text(
        page.locator("#table tbody tr.chosen td").first.text_content().strip()
    )


def test_hover_says_what_is_known(page: Any) -> None:
    dot = page.locator("#chart .dot[aria-label^='rm, macs 0.5']")
    dot.hover()
    tip = page.locator("#tip")
    for words in (
        "rm, macs 0.5",
        "seed0/macs_ratio-0.5",
        "8 8 8 8 8 8 8 10",
        "2 removed, 1 kept",
        "2 seeds",
        "of rm",
        "1.2e-15",
        "10 kB at the peak",
    ):
        expect(tip).to_contain_text(words)
    page.locator("h1").hover()
    expect(tip).to_be_hidden()
    dot.click()
    expect(page.locator("#details")).to_contain_text("its shortcut samples another grid")
    expect(page.locator("#details")).to_contain_text("python -m rmprune slim --macs-ratio 0.5 --seed 0")
    page.get_by_role("button", name="its layers").click()
    assert "rm, macs 0.5, seed 0" in page.locator("#network option:checked").text_content()
    assert page.evaluate("document.activeElement.id") == "network"
    page.get_by_role("button", name="its training").click()
    assert page.evaluate("document.activeElement.id") == "run"


def test_the_points_by_keyboard(page: Any) -> None:
    assert page.locator("#chart .dot[tabindex='0']").count() == 1
    page.locator("#chart .dot[tabindex='0']").focus()
    first = page.evaluate("document.activeElement.getAttribute('aria-label')")
    expect(page.locator("#tip")).to_be_visible()
    page.keyboard.press("ArrowRight")
    second = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert second != first
    page.keyboard.press("Enter")
    expect(page.locator("#details h3")).to_contain_text(second.split(":")[0])
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == second
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == first
    page.keyboard.press("Escape")
    expect(page.locator("#tip")).to_be_hidden()
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.closest('#methods') !== null")


def test_layers_curves_and_what_was_left_out(page: Any) -> None:
    drawing = page.locator("#drawing")
    for method, fates in (
        ("rm", (1, 2, 0, 0)),
        ("mixed-collapse", (2, 0, 1, 0)),
        ("coupled", (2, 0, 0, 1)),
        ("residual", (3, 0, 0, 0)),
    ):
        option = page.locator("#network option", has_text=re.compile(rf"^{method}, macs 0.5, seed 0")).first
        page.locator("#network").select_option(option.get_attribute("value"))
        for fate, count in zip(("kept", "removed", "merged", "dropped"), fates, strict=True):
            expect(drawing).to_contain_text(f"residual {fate}: {count}")
    expect(drawing).to_contain_text("16 → 8")
    rm = page.locator("#network option", has_text=re.compile(r"^rm, macs 0.5, seed 0")).first
    page.locator("#network").select_option(rm.get_attribute("value"))
    drawing.locator(".profile summary").click()
    expect(drawing.locator(".profile tbody tr").first).to_have_text("conv1Conv3 → 813.8 k0.0675.0 %")
    older = page.locator("#network option", has_text="older)").first
    page.locator("#network").select_option(older.get_attribute("value"))
    expect(drawing).to_contain_text("does not list layers")
    assert page.locator("#training svg g[aria-label=line]").count() == 4
    assert page.locator("#searches figure").count() == 1
    page.locator("#run").select_option(label=page.locator("#run option", has_text="older").first.text_content())
    expect(page.locator("#training")).to_contain_text("holds no training curves")
    expect(page.locator("#errors")).to_contain_text("1.2e-15")
    expect(page.locator("#left-out")).to_contain_text("there is no record under it")
    expect(page.locator("#left-out")).to_contain_text(page_records.HOSTILE)
    page.locator("#commands summary").click()
    expect(page.locator("#commands")).to_contain_text("--macs-ratio 0.25 --seed 1")
    expect(page.locator("#command")).to_have_text("report runs")


def test_phone_dark_and_print(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    narrow = re.compile(r"(\d{1,2}|[12]\d\d|3[0-8]\d)(\.\d+)?")
    expect(page.locator("#chart svg").first).to_have_attribute(
        "width", narrow
    )  # the page's policy forbids a polled script
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    heights = page.eval_on_selector_all(
        "#controls label:has(input), #controls select, #methods button", "all => all.map(e => e.offsetHeight)"
    )
    assert min(heights) >= 30
    dot = page.locator("#chart .dot[aria-label^='rm, macs 0.5']").bounding_box()
    page.mouse.click(dot["x"] + 12, dot["y"] + 12)  # near is enough for a finger
    expect(page.locator("#details h3")).not_to_contain_text("No network")
    page.locator(".profile summary").click()
    widths = page.eval_on_selector_all("tbody td:first-child", "all => all.map(cell => cell.offsetWidth)")
    assert len(widths) > 20 and max(widths) < 200  # the other columns can be reached beside a name of 90 letters
    page.locator("#group").select_option("1")
    page.get_by_role("button", name="all", exact=True).click()
    page.locator("#chart .dot").first.dispatch_event("focus")
    assert page.evaluate("document.documentElement.scrollWidth") == 390  # with a name of 90 letters too
    assert colours(page) == ("rgb(255, 255, 255)", "rgb(27, 29, 32)")
    page.emulate_media(color_scheme="dark")
    assert colours(page) == ("rgb(20, 23, 26)", "rgb(233, 235, 238)")
    page.emulate_media(media="print", color_scheme="dark")
    assert colours(page) == ("rgb(255, 255, 255)", "rgb(27, 29, 32)")
    assert not page.locator("#methods .all").first.is_visible() and page.locator("#table").is_visible()
    page.set_viewport_size({"width": 700, "height": 1000})  # between the margins of a page
    assert page.evaluate("document.documentElement.scrollWidth") == 700


def colours(page: Any) -> tuple[str, str]:
    return tuple(page.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))"))
