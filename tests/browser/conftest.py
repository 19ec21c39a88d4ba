"""A real browser, where one is installed; nothing is downloaded for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDE, NARROW = (1280, 900), (390, 844)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window and without what it fetches by itself."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=path, args=flags)
        yield opened
        opened.close()


@dataclass
class Shown:
    """A page as the browser shows it, and what happened while it did."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def colours(self) -> dict[str, Any]:
        """Of the page, and of what Bokeh draws."""
        found: dict[str, Any] = self.page.evaluate(
            """() => {
                const models = [...Bokeh.documents[0].all_models];
                const named = (type) => models.find((one) => one.type == type);
                const line = models.find((one) => one.type == "Step" && one.tags.includes("measured"));
                return {
                    page: getComputedStyle(document.body).backgroundColor,
                    ink: getComputedStyle(document.body).color,
                    axis: named("LinearAxis").major_label_text_color,
                    line: line.line_color.value ?? line.line_color,
                };
            }"""
        )
        return found


@pytest.fixture
def show(browser: Any) -> Iterator[Callable[..., Shown]]:
    """Open a page and wait until its charts are drawn."""
    contexts = []

    def open_page(path: Path, size: tuple[int, int] = WIDE, scheme: str = "light") -> Shown:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        contexts.append(context)
        shown = Shown(context.new_page())
        page = shown.page
        page.on("console", lambda one: shown.complaints.append(one.text) if one.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: shown.complaints.append(str(error)))
        page.on("request", lambda request: shown.requests.append(request.url))
        page.on("dialog", lambda dialog: (shown.dialogs.append(dialog.message), dialog.dismiss()))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-charts=shown]", timeout=20_000)
        # Two frames: what was laid out is drawn.
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return shown

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def page_file(
    tmp_path_factory: pytest.TempPathFactory,
    bench_folder: Callable[[], Any],
    judged: Callable[..., Any],
) -> Callable[..., Path]:
    """Write the page of a small run, whose names and ids may be given."""
    pytest.importorskip("bokeh", reason="the page needs the extra html")
    from calibrate.errors import compare
    from calibrate.reports import html_report
    from calibrate.reports.report import Report
    from profiles.deployment import resolve
    from profiles.profile import load_profile
    from replay.readers import read_trace
    from replay.run import facts_of, replay

    def write(text: str = "by hand", ids: Callable[[int], str] = "bench-{}".format) -> Path:
        folder = tmp_path_factory.mktemp("page")
        sample = bench_folder()
        for place, row in enumerate(sample.requests):
            row["request_id"] = ids(place)
        trace = read_trace(sample.write(folder / "run"))
        trace = trace.with_meta(name=text, notes=[text])
        deployment = resolve(load_profile("roofline:l4"), facts_of(trace))
        replayed = replay(trace, deployment, cold_start=False)
        report = Report(trace, deployment, replayed, compare(trace, replayed.predicted), command=text)
        path = folder / "page.html"
        path.write_text(html_report.render(judged(report, text)), encoding="utf-8")
        return path

    return write
