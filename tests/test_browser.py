"""The report in a real browser: it loads, moves, opens, closes, fits a phone, asks for nothing."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from sklearn.metrics import accuracy_score, f1_score

from msvae.report.gallery import Gallery, Item, MapView, ScoreLine
from msvae.report.page import Comparison, Figure, Report, ScoreFigures, render, write_report
from msvae.report.summary import Summary
from msvae.report.tables import Table
from msvae.report.thresholds import ThresholdData

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    reason = "needs Chromium and its driver (Debian: apt-get install chromium chromium-driver)"
    if os.environ.get("MSVAE_REQUIRE_BROWSER"):
        pytest.fail(f"MSVAE_REQUIRE_BROWSER is set, but this {reason}", pytrace=False)
    pytest.skip(reason, allow_module_level=True)

SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SIDE = 48
MASK = np.zeros((SIDE, SIDE), dtype=bool)
MASK[10:20, 6:30] = True
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 300 100">'
    '<path d="M0 0L300 100" stroke="#0072b2"/></svg>'
)


@pytest.fixture(scope="module")
def data():
    """Scores of 60 normal and 40 anomalous images, ties among them, calibrated on 39 others."""
    rng = np.random.default_rng(4)
    labels = np.repeat([0, 1], [60, 40])
    scores = np.round(np.where(labels, rng.normal(13, 3, 100), rng.normal(10, 1.5, 100)), 1)
    calibration = np.round(rng.normal(10, 1.5, 39), 1)
    p = (1 + (calibration >= scores[:, None]).sum(axis=1)) / 40
    return SimpleNamespace(labels=labels, scores=scores, p=p)


def item(k, mask=None):
    rng = np.random.default_rng(k)
    image = rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    heat = np.where(MASK, 3.0, 1.0).astype(np.float32)
    return Item(
        name=f"some/folder/with_a_long_name/picture_number_{k}.png",
        image=image,
        score=12.5 + k,
        p=0.025,
        flagged=True,
        label=1,
        kind="crack",
        reconstruction=image[::-1].copy(),
        maps=(
            MapView(name="Heat", values=heat, scale=(0, 3), level=2.0),
            MapView(name="Sign", values=1 - heat, scale=(-2, 2), signed=True),
        ),
        mask=mask,
        scores=(ScoreLine("reconstruction", 0.25, 0.05), ScoreLine("fused", 12.5, 0.025)),
        contributions={"residual": 4.5, "latent": -1.25},
        notes=("Region 6,10 to 30,20 px",),
        nearest=(("normal.png", image),),
    )


def report_of(data):
    labelled = ThresholdData(scores=data.scores, p=data.p, labels=data.labels, n_conformal=39)
    plain = ThresholdData(scores=data.scores, threshold=12.0, name="without labels")
    figures = ScoreFigures(auroc=0.8, auroc_ci95=(0.7, 0.9), average_precision=0.9, f1=0.5)
    protocols = {
        "equalised": {"a_score_of_some_length": figures, "fused": figures},
        "native": {"fused": figures},
    }
    return Report(
        title="A report of a run with a rather long title",
        summaries=(Summary(images=100, flagged=30, target_fpr=0.05, n_conformal=39),),
        thresholds=(labelled, plain),
        comparison=Comparison(
            protocols=protocols, about={"fused": "all of them"}, notes=("A note.",)
        ),
        galleries=(
            Gallery(title="Most anomalous", items=(item(0, MASK), item(1), item(2, MASK))),
            Gallery(title="Misses", items=(item(3),)),
        ),
        tables=(
            Table(title="Maps", columns=tuple("abcdefgh"), rows={"fused": [0.5] * 8}),
            Table(title="Do the maps explain?", columns=("wins",), rows={"fused": [0.9]}),
        ),
        figures=(Figure(title="Curve", svg=SVG, alt="A falling line"),),
        unreadable=(("x/" * 60 + "broken.png", "is cut short"),),
        facts={"model": {"image_size": "64", "platform": "Linux-" + "x86" * 40}},
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def path(data, tmp_path_factory):
    return write_report(tmp_path_factory.mktemp("page") / "report.html", report_of(data))


@pytest.fixture
def page(browser, path):
    """The page, freshly loaded on a desktop in light colours."""
    show(browser, 1280, "light")
    browser.get(path.as_uri())
    return browser


def show(browser, width, scheme):
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def sliders(page):
    return page.find_elements(By.CSS_SELECTOR, "[data-slider]")


def shown(box, name):
    return box.find_element(By.CSS_SELECTOR, f"[data-count={name}]").text


def counts(box):
    return {name: int(shown(box, name)) for name in ("tp", "fn", "fp", "tn")}


def counted(flagged, labels):
    pairs = {"tp": (1, True), "fn": (1, False), "fp": (0, True), "tn": (0, False)}
    return {k: int(((labels == y) & (flagged == f)).sum()) for k, (y, f) in pairs.items()}


def press(element, key, times=1):
    for _ in range(times):
        element.send_keys(key)


def test_it_starts_at_the_runs_own_decision(page, data):
    """Before anything is moved the counts are those of p <= 5 %, the rate that was asked for."""
    box = sliders(page)[0]
    assert counts(box) == counted(data.p <= 0.05, data.labels)
    assert box.find_element(By.CSS_SELECTOR, "[data-rate-text]").text == "5 %"


def test_every_section_can_be_jumped_to(page):
    """The links at the top name each heading that is seen, every table's too, and nothing else."""
    links = page.execute_script("return [...document.querySelectorAll('nav a')].map(a => a.hash)")
    headings = page.execute_script(
        "return [...document.querySelectorAll('main section > h2:not(.quiet)')]"
        ".filter(h => h.offsetParent).map(h => '#' + (h.closest('section').id || h.id))"
    )
    assert links == headings
    assert len(links) == 9


def test_the_score_slider_counts_exactly(page, data):
    """At every threshold the four counts and the figures beside them are those of the scores."""
    box = sliders(page)[0]
    slider = box.find_element(By.CSS_SELECTOR, "[data-score]")
    weight = np.where(data.labels, 1 / 40, 1 / 60)
    for key in (Keys.HOME, Keys.PAGE_UP, Keys.ARROW_UP, Keys.PAGE_UP, Keys.ARROW_LEFT):
        press(slider, key, 1 if key == Keys.HOME else 3)
        flagged = data.scores >= float(shown(box, "threshold"))
        assert counts(box) == counted(flagged, data.labels)
        f1 = f1_score(data.labels, flagged, sample_weight=weight)
        accuracy = accuracy_score(data.labels, flagged, sample_weight=weight)
        assert abs(float(shown(box, "f1")) - f1) <= 0.0005 + 1e-9
        assert abs(float(shown(box, "accuracy").rstrip("\u00a0 %")) - 100 * accuracy) <= 0.051
    press(slider, Keys.END)
    assert shown(box, "threshold") == "above all scores"
    assert counts(box) == {"tp": 0, "fn": 40, "fp": 0, "tn": 60}


def test_the_mouse_moves_the_slider(page, data):
    """A click into the middle of the histogram's axis sets the threshold there."""
    box = sliders(page)[0]
    before = shown(box, "threshold")
    box.find_element(By.CSS_SELECTOR, "[data-score]").click()
    assert shown(box, "threshold") != before
    assert counts(box) == counted(data.scores >= float(shown(box, "threshold")), data.labels)


def test_the_rate_slider_counts_exactly(page, data):
    """At every false-alarm rate the images flagged are those whose p-value keeps it."""
    box = sliders(page)[0]
    slider = box.find_element(By.CSS_SELECTOR, "[data-rate]")
    start = counts(box)
    seen = []
    for _ in range(6):
        press(slider, Keys.ARROW_RIGHT, 2)
        text = box.find_element(By.CSS_SELECTOR, "[data-rate-text]").text
        rate = float(text.rstrip("\u00a0 %")) / 100
        assert counts(box) == counted(data.p <= rate + 1e-9, data.labels)
        seen.append(rate)
    np.testing.assert_allclose(np.diff(seen), 2 / 40)
    assert counts(box) != start
    box.find_element(By.CSS_SELECTOR, "[data-reset]").click()
    assert counts(box) == start


def test_without_labels_it_counts_the_flagged(page, data):
    """A folder without labels starts at its threshold and tells how many would be flagged."""
    box = sliders(page)[1]
    assert float(shown(box, "threshold")) == data.scores[data.scores >= 12].min()
    press(box.find_element(By.CSS_SELECTOR, "[data-score]"), Keys.ARROW_RIGHT, 4)
    flagged = int((data.scores >= float(shown(box, "threshold"))).sum())
    assert (int(shown(box, "flagged")), int(shown(box, "passed"))) == (flagged, 100 - flagged)
    words = box.find_element(By.CSS_SELECTOR, "[data-words]").text
    assert words == f"Flags {flagged} of 100 images."


def viewer(page):
    return page.find_element(By.ID, "viewer")


def open_item(page, k=0):
    page.find_elements(By.CSS_SELECTOR, ".item")[k].send_keys(Keys.ENTER)
    return viewer(page)


def focused(page):
    return page.switch_to.active_element


def test_an_item_opens_steps_and_closes_by_keyboard(page):
    """Enter opens an image, the arrows step within its gallery, Escape closes; focus follows."""
    dialog = open_item(page)
    assert dialog.is_displayed()
    heading = lambda: dialog.find_element(By.TAG_NAME, "h2").text  # noqa: E731
    place = dialog.find_element(By.CSS_SELECTOR, "[data-place]")
    assert (heading(), place.text) == ("picture_number_0.png", "1 of 3")
    assert focused(page).text == "picture_number_0.png"
    for key, name, at in (
        (Keys.ARROW_LEFT, 0, 1),
        (Keys.ARROW_RIGHT, 1, 2),
        (Keys.ARROW_RIGHT, 2, 3),
        (Keys.ARROW_RIGHT, 2, 3),
        (Keys.ARROW_LEFT, 1, 2),
    ):
        focused(page).send_keys(key)
        assert (heading(), place.text) == (f"picture_number_{name}.png", f"{at} of 3")
    focused(page).send_keys(Keys.ESCAPE)
    assert not dialog.is_displayed()
    back = lambda _: focused(page).get_attribute("data-open") == "item-0-1"  # noqa: E731
    assert WebDriverWait(page, 10).until(back)  # the close event comes a moment later


def test_every_picture_is_there_and_told_in_words(page):
    """Each picture of the page and of an opened image loads and has an alternative text."""
    open_item(page)
    pictures = page.execute_script(
        "return [...document.querySelectorAll('img')].map((i) => [i.alt, i.naturalWidth])"
    )
    assert len(pictures) == 4 + 6  # thumbnails; input, rebuilt, defect, two maps, nearest
    assert all(alt.strip() and width > 0 for alt, width in pictures)
    drawings = page.find_elements(By.CSS_SELECTOR, "[role=img]")
    assert all(d.get_attribute("aria-label") for d in drawings)


BOX = "const b = arguments[0].getBBox(); return [b.x, b.y, b.x + b.width, b.y + b.height]"


def test_outlines_lie_where_the_pixels_are(page):
    """The defect's outline, and that of a map's level, enclose just the pixels they speak of."""
    dialog = open_item(page)
    rows, columns = np.nonzero(MASK)
    edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    for kind in ("truth", "level"):
        outline = dialog.find_element(By.CSS_SELECTOR, f".picture svg.{kind} path")
        np.testing.assert_allclose(page.execute_script(BOX, outline), edges, atol=0.6)


def test_the_true_defect_is_drawn_on_the_maps_at_will(page):
    """The switch draws the defect on every map, stays as set, and is away without a mask."""
    dialog = open_item(page)
    drawn = lambda: sum(  # noqa: E731
        s.is_displayed() for s in dialog.find_elements(By.CSS_SELECTOR, ".map svg.truth")
    )
    assert drawn() == 0
    dialog.find_element(By.CSS_SELECTOR, "[data-truth]").click()
    assert drawn() == 2
    dialog.find_element(By.CSS_SELECTOR, "[data-step='1']").click()
    assert not dialog.find_elements(By.CSS_SELECTOR, "[data-truth]")
    dialog.find_element(By.CSS_SELECTOR, "[data-step='1']").click()
    assert drawn() == 2


def test_nothing_is_asked_of_the_network_and_nothing_fails(page):
    """Used from top to bottom the page makes no request but for itself; the console is silent."""
    page.get_log("performance")
    page.get_log("browser")
    page.refresh()
    press(sliders(page)[0].find_element(By.CSS_SELECTOR, "[data-score]"), Keys.ARROW_RIGHT, 2)
    open_item(page)
    focused(page).send_keys(Keys.ARROW_RIGHT)
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    ]
    assert page.current_url in asked  # the page itself: the log is not just empty
    assert [url for url in asked if url != page.current_url and not url.startswith("data:")] == []
    assert page.get_log("browser") == []


@pytest.mark.parametrize("width", [390, 768])
def test_nothing_overflows(page, width):
    """On a phone or a tablet nothing makes the page scroll sideways, nor an opened image."""
    show(page, width, "light")
    overflow = "const e = arguments[0]; return [e.scrollWidth - e.clientWidth, innerWidth]"
    root = page.find_element(By.TAG_NAME, "html")
    assert page.execute_script(overflow, root) == [0, width]
    dialog = open_item(page)
    assert dialog.size["width"] <= width
    inside = dialog.find_element(By.CSS_SELECTOR, "[data-body]")
    assert page.execute_script(overflow, inside) == [0, width]
    assert page.execute_script(overflow, root) == [0, width]


CONTRASTS = """
const light = (rgb) => {
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const [r, g, b] = rgb.map((v) => linear(v / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const rgba = (colour) => colour.match(/[\\d.]+/g).map(Number);
const ground = (e) => {
  for (let at = e; at; at = at.parentElement) {
    const [r, g, b, a] = rgba(getComputedStyle(at).backgroundColor);
    if (a !== 0) return [r, g, b];
  }
};
const found = [];
for (const e of document.querySelectorAll("body *")) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || e.closest("svg, script, template, :disabled") || !e.checkVisibility()) continue;
  const [a, b] = [rgba(getComputedStyle(e).color), ground(e)].map((c) => light(c.slice(0, 3)));
  found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML.slice(0, 80)]);
}
return found;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(page, scheme):
    """In light and dark every text has the contrast of 4.5 that WCAG AA asks for."""
    show(page, 1280, scheme)
    open_item(page)
    found = page.execute_script(CONTRASTS)
    assert len(found) > 100
    assert [f for f in found if f[0] < 4.5] == []


def test_a_hundred_thousand_images(browser, tmp_path):
    """100,000 scores and a full gallery of noise stay under 15 MB, and the counts are exact."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 100_000)
    scores = np.round(rng.normal(0, 1, labels.size) + labels, 4)
    noise = [rng.integers(0, 255, (320, 320, 3), dtype=np.uint8) for _ in range(24)]
    heat = rng.random((320, 320)).astype(np.float32)
    items = tuple(
        Item(
            name=f"{k}.png",
            image=image,
            maps=(MapView(name="Heat", values=heat, scale=(0, 1), level=0.99),),
        )
        for k, image in enumerate(noise)
    )
    report = Report(
        title="large",
        summaries=(Summary(images=labels.size, flagged=0, target_fpr=0.05),),
        thresholds=(ThresholdData(scores=scores, labels=labels, threshold=1.0),),
        galleries=(Gallery(title="Most anomalous", items=items),),
    )
    path = write_report(tmp_path / "large.html", report)
    assert path.stat().st_size < 15_000_000
    browser.get(path.as_uri())
    # a page of this size may still be read when `get` comes back
    whole = "return document.readyState === 'complete'"
    WebDriverWait(browser, 60).until(lambda b: b.execute_script(whole))
    assert len(browser.find_elements(By.CSS_SELECTOR, ".item")) >= 24
    data = json.loads(sliders(browser)[0].find_element(By.TAG_NAME, "script").get_attribute("text"))
    threshold = data["t"][data["start"]]
    found = int((scores[labels == 1] >= threshold).sum())
    words = sliders(browser)[0].find_element(By.CSS_SELECTOR, "[data-words]").text
    assert words.startswith(f"Finds {found:,} of {int(labels.sum()):,} anomalous images")


def test_names_cannot_become_markup(browser, tmp_path):
    """A file's name that looks like HTML is shown as it is, and runs nothing."""
    name = "<img src=x onerror=alert(1)>/<script>alert(2)</script>_&.png"
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    hostile = Report(
        title=name,
        summaries=(Summary(images=1, flagged=1, target_fpr=0.05),),
        galleries=(Gallery(title=name, items=(Item(name=name, image=image, kind=name),)),),
        unreadable=((name, name),),
        facts={name: {name: name}},
    )
    assert not re.search(r"<img src=x", render(hostile))
    path = write_report(tmp_path / "hostile.html", hostile)
    browser.get_log("browser")
    browser.get(path.as_uri())
    assert browser.find_element(By.TAG_NAME, "h1").text == name
    open_item(browser)
    assert browser.get_log("browser") == []
