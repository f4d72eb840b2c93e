"""TensorBoard as users open it: the images and scalars of a real run, in headless Chromium."""

import shutil
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait

from tests.conftest import Start, free_port
from vaescale.monitoring import pictures
from vaescale.monitoring.board import Board

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1500,2400"
)
WAIT = 120  # seconds; a page that is ready ends it at once


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[WebDriver]:
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("no chromedriver on the PATH (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path / 'chromium'}"]:
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


def run(folder: Path) -> Path:
    """Two attempts of a run, with everything that a trainer writes."""
    x = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    for begin, end in ((0, 6), (4, 9)):
        board = Board(folder, begin)
        board.text("config", "    steps: 9", begin)
        for step in range(begin + 1, end):
            board.scalars(
                {"codebook/usage_window": step / 10, "codebook/perplexity": 3.0, "train/loss": 1 / step}, step
            )
            board.code_counts("codebook/counts", torch.arange(30), step)
        board.picture("val/reconstructions", pictures.reconstructions(x, x), end - 1)
        tiles = torch.randint(0, 256, (100, 3, 32, 32), dtype=torch.uint8)
        board.picture("codebook/decoded", pictures.codebook(tiles, torch.arange(100), torch.arange(100) < 70), end - 1)
        board.close()
    return folder / "tensorboard"


def test_grids_and_codebook_scalars_are_shown(tmp_path: Path, start: Start, browser: WebDriver) -> None:
    port = free_port()
    logs = run(tmp_path / "run")
    start(
        [
            sys.executable,
            "-m",
            "tensorboard.main",
            "--logdir",
            str(logs),
            "--port",
            str(port),
            "--host",
            "127.0.0.1",
        ]
    )
    waiting = WebDriverWait(browser, WAIT, ignored_exceptions=[OSError, WebDriverException])
    waiting.until(
        lambda _: urllib.request.urlopen(f"http://127.0.0.1:{port}/data/environment", timeout=5).status == 200
    )
    browser.get(f"http://127.0.0.1:{port}/#timeseries")

    def tags() -> set[str]:
        for closed in browser.find_elements(
            By.CSS_SELECTOR, 'metrics-card-group-toolbar mat-icon[svgicon="expand_more_24px"]'
        ):
            closed.click()  # TensorBoard opens the first two groups by itself
        return {card.text.replace("\n", "") for card in browser.find_elements(By.CSS_SELECTOR, "card-view .tag")}

    wanted = {
        "codebook/Usage_window",
        "codebook/Perplexity",
        "codebook/counts",
        "codebook/Decoded",
        "Train/Loss",
        "Val/Reconstructions",
    }
    cards = "return [...document.querySelectorAll('card-view .tag')].map(card => card.innerText.replace(/\\s/g, ''))"
    waiting.until(lambda _: len(browser.find_elements(By.CSS_SELECTOR, "card-view .tag")) >= 2)
    assert browser.execute_script(cards)[:2] == ["Train/Loss", "Val/Reconstructions"]  # the first screen
    waiting.until(lambda _: wanted <= tags())
    waiting.until(lambda _: len(browser.find_elements(By.CSS_SELECTOR, "image-card img")) >= 2)
    drawn = "return arguments[0].complete && arguments[0].naturalWidth"
    for picture in browser.find_elements(By.CSS_SELECTOR, "image-card img"):
        waiting.until(lambda _, picture=picture: (browser.execute_script(drawn, picture) or 0) > 200)
    curves = "scalar-card line-chart"
    assert len(browser.find_elements(By.CSS_SELECTOR, curves)) >= 3
