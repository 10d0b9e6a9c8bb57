"""Pages in headless Chromium, for tests. Needs selenium, Chromium and its driver."""

import contextlib
import shutil
import time

import pytest

BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))


@contextlib.contextmanager
def browsers(address, *, window, phone_screen):
    """Yields a function that opens the page in a new browser, and the list of those; closes them at the end.

    `window` and `phone_screen` are (width, height) in pixels; the function takes `phone=True`.
    """
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (BROWSER and DRIVER):
        pytest.skip("needs chromium and chromedriver")
    opened = []

    def open_page(phone=False):
        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        size = "--window-size={},{}".format(*window)
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", size):
            options.add_argument(flag)
        if phone:
            metrics = {"width": phone_screen[0], "height": phone_screen[1], "pixelRatio": 2, "touch": True}
            options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        opened.append(browser)
        browser.get(address)
        return browser

    try:
        yield open_page, opened
    finally:
        for browser in opened:
            browser.quit()


def wait_for(condition, seconds=180):
    """Returns the first true value of a condition, which may ask for elements that the page is just replacing."""
    from selenium.common.exceptions import StaleElementReferenceException

    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(StaleElementReferenceException):
            if value := condition():
                return value
        assert time.monotonic() < end, "the page does not get there"
        time.sleep(0.1)
