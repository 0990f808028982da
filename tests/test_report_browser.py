"""A run's page in a real browser: it opens from disk, complains of nothing, and its map answers."""

import shutil

import numpy as np
import pytest

from empssl import main
from empssl_support import files, report
from recipes import SHAPES

for module in ("matplotlib", "sklearn", "bokeh", "selenium"):
    pytest.importorskip(module)
from selenium import webdriver  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="there is no Chromium with its chromedriver on PATH"
)

# Where in the window dot 0 is, and what it stands for.
DOT = """
const view = Object.values(Bokeh.index)[0] ?? [...Bokeh.index][0]
const plot = view.model
const source = plot.renderers[0].data_source
const {x, y, picture, about} = source.data
const canvas = view.el.getBoundingClientRect()
const across = view.frame.x_scale.compute(x[arguments[0]])
const down = view.frame.y_scale.compute(y[arguments[0]])
return [canvas.left + across, canvas.top + down, picture[arguments[0]], about[arguments[0]]]
"""
# The picture and the words of the tooltips that are shown, in whatever shadow they stand.
TOOLTIPS = """
const found = []
function walk(root) {
  for (const element of root.querySelectorAll("*")) {
    if (element.shadowRoot) walk(element.shadowRoot)
    if (element.tagName != "IMG" || root == document || !element.naturalWidth) continue
    found.push([element.src, element.getRootNode().textContent])
  }
}
walk(document)
return found
"""


@pytest.fixture
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def run(in_tmp, short_runs):
    """With a class whose name is a piece of HTML."""
    main([*SHAPES, "--name", "demo"])
    path = in_tmp / "runs" / "demo"
    kept = dict(np.load(path / "report.npz"))
    kept["classes"] = ["<img src=x onerror=alert(1)></script>", *kept["classes"][1:]]
    files.write_features(path / "report.npz", **kept)
    report.write(path)
    return path


def opened(browser, run, width, height=900, mobile=False):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": mobile})
    browser.execute_cdp_cmd("Network.enable", {})
    nothing = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", nothing)
    browser.get((run / "report.html").as_uri())
    drawn = "return window.Bokeh && Bokeh.documents.length && Bokeh.documents[0].is_idle"
    WebDriverWait(browser, 30).until(lambda driver: driver.execute_script(drawn))
    browser.execute_script("document.querySelector('.map').scrollIntoView()")


def complaints(browser):
    return [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"]


def test_a_dot_shows_its_image_under_the_pointer(browser, run):
    opened(browser, run, 1000)
    for i in (0, 7):
        x, y, picture, about = browser.execute_script(DOT, i)
        move = {"type": "mouseMoved", "x": x, "y": y}
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", move)
        wait = WebDriverWait(browser, 10)
        tooltips = wait.until(lambda driver: driver.execute_script(TOOLTIPS))
        assert tooltips[0][0] == picture and about in tooltips[0][1]
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", move | {"x": 1, "y": 1})
        wait.until_not(lambda driver: driver.execute_script(TOOLTIPS))
    assert complaints(browser) == []


def test_on_a_phone_a_dot_shows_its_image_where_it_is_touched(browser, run):
    opened(browser, run, 360, 700, mobile=True)
    x, y, picture, about = browser.execute_script(DOT, 3)
    touch = {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]}
    browser.execute_cdp_cmd("Input.dispatchTouchEvent", touch)
    browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    shown = "const t = document.querySelector('#touched img'); return t.offsetWidth && t.src"
    wait = WebDriverWait(browser, 10)
    assert wait.until(lambda driver: driver.execute_script(shown)) == picture
    words = "return document.querySelector('#touched figcaption').textContent"
    assert browser.execute_script(words) == about
    # Nothing reaches beyond the screen's edge.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    assert complaints(browser) == []


def test_every_picture_is_drawn_by_day_and_by_night(browser, run):
    backgrounds = set()
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        opened(browser, run, 1000)
        images = "[...document.images].filter(i => i.getAttribute('src'))"
        whole = f"return {images}.every(i => i.complete && i.naturalWidth > 0)"
        WebDriverWait(browser, 10).until(lambda driver, whole=whole: driver.execute_script(whole))
        assert browser.execute_script(f"return {images}.length") > 12 * 17
        colour = "return getComputedStyle(document.body).backgroundColor"
        backgrounds.add(browser.execute_script(colour))
    assert len(backgrounds) == 2
    fetched = "return performance.getEntriesByType('resource').map(e => e.name.slice(0, 5))"
    assert set(browser.execute_script(fetched)) <= {"data:"}
    assert complaints(browser) == []
