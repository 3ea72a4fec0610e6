"""The site of the guides: it is built without a warning, and read in a browser without a network."""

import os
import re
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest


ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    # No address, and one of which the theme asks nothing.
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "REPOSITORY_URL": "https://example.org/me/e3"}
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return folder


@pytest.fixture(scope="module")
def address(site):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_pages_read_as_they_do_in_the_repository(site):
    pages = {path.name: path.read_text() for path in site.glob("*.html")}
    assert len(pages) > 15
    for name, page in pages.items():
        text = re.sub(r"<(pre|code|script)\b.*?</\1>", "", page, flags=re.DOTALL)
        # What Python-Markdown takes for text where GitHub makes a table, a list or code.
        assert re.findall(r"<p>(?:\||```|- ).*|^- .*", text, re.MULTILINE) == [], name
        assert re.findall(r"\\\(.*|\[<code>.*|.*arithmatex.*", text) == [], name
        assert re.findall(r'<(?:script|img|link rel="stylesheet")[^>]*"https?://[^>]*', page) == [], name
    assert 'href="https://example.org/me/e3/blob/main/e3_trl/method/budget.py"' in pages["method.html"]
    assert 'href="recipes.html#memory-per-gpu"' in pages["reproduce.html"]
    assert all("E3GRPOTrainer" in pages[f"{name}.html"] for name in ("notebook", "notebook_gsm8k"))


def test_a_reader_finds_the_way(address, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.expected_conditions import element_to_be_clickable, url_contains
    from selenium.webdriver.support.ui import WebDriverWait

    wait = WebDriverWait(browser, 20)
    browser.get_log("browser")  # of earlier tests

    def loaded() -> list[str]:
        return browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")

    browser.get(f"{address}/index.html")
    picture = browser.find_element(By.CSS_SELECTOR, "img[src='efficiency_runs.png']")
    assert browser.execute_script("return arguments[0].decode().then(() => arguments[0].naturalWidth)", picture) > 1000
    requests = loaded()
    menu = browser.find_element(By.CSS_SELECTOR, ".md-nav--primary")
    menu.find_element(By.LINK_TEXT, "Which switch for what").click()
    wait.until(url_contains("method.html"))
    fraction = browser.find_element(By.CSS_SELECTOR, "math[display=block] mfrac")
    over, under = fraction.find_elements(By.XPATH, "./*")
    assert over.rect["y"] + over.rect["height"] <= under.rect["y"] + 1, "drawn as a fraction"
    requests += loaded()
    browser.find_element(By.CSS_SELECTOR, ".md-search__input").send_keys("temperature_spread")
    result = (By.CSS_SELECTOR, ".md-search-result__link[href*='settings.html'][href$='#temperature_spread']")
    wait.until(element_to_be_clickable(result)).click()
    wait.until(url_contains("#temperature_spread"))
    heading = browser.find_element(By.ID, "temperature_spread")
    assert 0 <= browser.execute_script("return arguments[0].getBoundingClientRect().top", heading) < 500
    requests += loaded()
    browser.get(f"{address}/api.html#e3_trl.allocate_rollouts")
    assert "allocate_rollouts" in browser.find_element(By.ID, "e3_trl.allocate_rollouts").text
    requests += loaded()
    assert len(requests) > 10
    assert [request for request in requests if not request.startswith(address)] == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
