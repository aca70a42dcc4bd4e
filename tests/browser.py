"""A real browser in which tests open pages."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def open_page(width: int = 1280) -> Iterator[Page]:
    """Open an empty page, ``width`` CSS pixels wide, in the system's Chromium or else Playwright's.

    Skips the test if there is neither.
    """
    found = next(filter(None, map(shutil.which, NAMES)), None)
    with sync_playwright() as playwright:
        program = found or playwright.chromium.executable_path
        if not Path(program).exists():
            pytest.skip("there is no browser here; .venv/bin/playwright install chromium")
        browser = playwright.chromium.launch(executable_path=program)
        yield browser.new_page(viewport={"width": width, "height": 800})
        browser.close()
