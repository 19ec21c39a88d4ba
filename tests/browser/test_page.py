"""The HTML page in a real browser: light and dark, wide and narrow, attacked, pointed at."""

from __future__ import annotations

from itertools import pairwise

import pytest

WIDE, NARROW, SMALLEST = (1280, 900), (390, 844), (320, 640)
CONTRAST = """() => {
    const luminance = ([r, g, b]) => [r, g, b].map((one) => one / 255)
        .map((one) => one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
        .reduce((sum, one, place) => sum + one * [0.2126, 0.7152, 0.0722][place], 0);
    const paint = document.createElement("canvas").getContext("2d");
    const numbers = (colour) => {
        paint.fillStyle = colour;
        paint.fillRect(0, 0, 1, 1);
        return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const css = getComputedStyle(document.documentElement);
    const of = (name) => luminance(numbers(css.getPropertyValue(name).trim()));
    return (name) => {
        const [dark, light] = [of(name), of("--page")].sort((one, other) => one - other);
        return (light + 0.05) / (dark + 0.05);
    };
}"""
TEXT = ("--ink", "--soft", "--link", "--good", "--bad", "--unsure")
DRAWN = (
    *("--measured", "--predicted", "--point", "--zero", "--part-step_time", "--part-scheduling", "--part-queueing"),
    *("--part-front_end", "--part-data", "--part-unexplained"),
)


@pytest.fixture(scope="module")
def plain(page_file):
    return page_file()


@pytest.mark.parametrize(
    ("size", "scheme"),
    [(WIDE, "light"), (NARROW, "light"), (NARROW, "dark"), (SMALLEST, "light")],
    ids=["wide", "narrow", "narrow-dark", "smallest"],
)
def test_it_loads_offline_without_complaint_and_does_not_scroll_sideways(show, plain, size, scheme):
    shown = show(plain, size, scheme)
    assert shown.complaints == []
    assert shown.requests == [plain.as_uri()]
    width, content = shown.page.evaluate("[innerWidth, document.documentElement.scrollWidth]")
    assert content <= width == size[0]
    overflow = shown.page.evaluate(
        """() => [...document.querySelectorAll("body *")].filter((one) => !one.closest(".scroll"))
            .filter((one) => one.getBoundingClientRect().right > innerWidth + 1)
            .map((one) => one.outerHTML.slice(0, 99))"""
    )
    assert overflow == []


def test_every_chart_is_drawn(show, plain):
    page = show(plain).page
    charts = page.locator(".chart")
    assert charts.count() >= 12
    assert page.evaluate("Bokeh.documents[0].roots().length") == charts.count()
    sizes = [charts.nth(place).bounding_box() for place in range(charts.count())]
    assert all(box["width"] > 250 and box["height"] >= 200 for box in sizes)
    drawn = page.evaluate(
        """() => Bokeh.index.roots.filter((view) => view.model.type == "Figure").map((view) => {
            const canvas = view.canvas_view.primary.el, paint = canvas.getContext("2d");
            return new Set(paint.getImageData(0, 0, canvas.width, canvas.height).data).size;
        })"""
    )
    assert len(drawn) == charts.count()
    assert min(drawn) > 10


def test_charts_follow_light_and_dark(show, plain):
    shown = show(plain, scheme="light")
    light = shown.colours()
    shown.page.emulate_media(color_scheme="dark")
    shown.page.wait_for_timeout(300)
    dark = shown.colours()
    assert all(light[name] != dark[name] for name in light)
    assert dark == show(plain, scheme="dark").colours()
    assert light["page"] == "rgb(255, 255, 255)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out_from_the_page(show, plain, scheme):
    """WCAG 2.1: 4.5 to 1 for text (AA), 3 to 1 for what is drawn."""
    page = show(plain, scheme=scheme).page
    ratios = {name: page.evaluate(f"name => ({CONTRAST})()(name)", name) for name in (*TEXT, *DRAWN)}
    assert {name: ratio for name, ratio in ratios.items() if ratio < (4.5 if name in TEXT else 3.0)} == {}


def hover(page, chart, request):
    """Point at a request in a chart, and return the text of the boxes that appear."""
    page.locator(f"#{chart}").scroll_into_view_if_needed()
    place = page.evaluate(
        """([chart, request]) => {
            const host = document.getElementById(chart);
            const view = Bokeh.index.roots.find((one) => host.contains(one.el));
            const dots = view.model.renderers.find((one) => one.name == "requests");
            const row = dots.data_source.data.request.indexOf(request);
            const [x, y] = ["x", "y"].map((axis) => dots.data_source.data[dots.glyph[axis].field][row]);
            const box = view.canvas_view.el.getBoundingClientRect();
            return [box.x + view.frame.x_scale.compute(x), box.y + view.frame.y_scale.compute(y)];
        }""",
        [chart, request],
    )
    page.mouse.move(place[0] - 3, place[1])
    page.mouse.move(*place)
    page.wait_for_timeout(300)
    return page.evaluate(
        """() => {
            const found = [];
            const walk = (root) => root.querySelectorAll("*").forEach((one) => {
                if (one.classList.contains("bk-Tooltip")) found.push((one.shadowRoot ?? one).textContent);
                if (one.shadowRoot) walk(one.shadowRoot);
            });
            walk(document);
            return found.join(" ");
        }"""
    )


def first_scatter(page):
    return page.locator("#scatter .chart").first.get_attribute("id")


def test_pointing_at_a_request_names_it(show, plain):
    page = show(plain).page
    for request in ("bench-1", "bench-4"):
        said = hover(page, first_scatter(page), request)
        assert request in said
        assert "prompt tokens" in said
        assert "TTFT" in said


def test_hostile_ids_do_nothing_even_when_pointed_at(show, page_file, hostile, browser):
    shown = show(page_file(hostile, lambda place: f"{place}{hostile}"))
    page = shown.page
    assert hostile.split("\n", maxsplit=1)[0] in hover(page, first_scatter(page), f"1{hostile}")
    assert page.evaluate("document.images.length + document.querySelectorAll('[onerror]').length") == 0
    assert shown.dialogs == []
    assert shown.complaints == []
    assert len(shown.requests) == 1


def test_the_pages_own_policy_stops_a_script_that_got_in(show, plain, tmp_path):
    """Even if an escape were missed one day."""
    text = plain.read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    planted = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
    broken.write_text(text.replace("<main>", f"<main>{planted}"), encoding="utf-8")
    shown = show(broken)
    assert shown.page.title() != "taken"
    stopped = [one for one in shown.complaints if "Content Security Policy" in one]
    assert any("script-src" in one and "inline script" in one for one in stopped)
    assert any("img-src" in one for one in stopped)


def test_it_can_be_walked_by_keyboard_and_headings(show, plain):
    page = show(plain, NARROW).page
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map((one) => Number(one.tagName[1]))")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "A"
    scrolling = page.evaluate(
        "[...document.querySelectorAll('.scroll')].filter((one) => one.scrollWidth > one.clientWidth)"
        ".map((one) => one.tabIndex)"
    )
    assert scrolling
    assert set(scrolling) == {0}
