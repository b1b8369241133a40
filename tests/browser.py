"""A headless Chromium that shows the app as a person sees it; what it needs is installed by CI."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import JavascriptException, NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

MISSING = shutil.which("chromium") is None or shutil.which("chromedriver") is None
# On a machine of a user these tests skip; CI installs the browser, and there they may not
needs_browser = pytest.mark.skipif(
    MISSING and os.environ.get("CI") != "true", reason="needs chromium and chromedriver (apt install chromium-driver)"
)
TRANSIENT = (JavascriptException, NoSuchElementException, StaleElementReferenceException)


@contextmanager
def chromium(width: int = 1280, height: int = 900, *, dark: bool = False) -> Iterator["Browser"]:
    """A fresh profile each time: no cookie and no storage of another test."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    options.add_argument("--disable-background-networking")
    options.add_argument(f"--window-size={width},{height}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        # A window cannot be narrower than 500 pixels, a phone is
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        scheme = "dark" if dark else "light"
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        yield Browser(driver)
    finally:
        driver.quit()


class Browser:
    """What the tests do with a page, in a person's terms."""

    def __init__(self, driver: Any):
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get(url)

    @property
    def text(self) -> str:
        return str(self.driver.execute_script("return document.body.innerText"))

    def wait(self, what: Callable[[], Any], seconds: float = 30, about: str = "") -> Any:
        """The first truthy value; fails with the page's text when none came in time."""
        end = time.monotonic() + seconds
        while True:
            try:
                if found := what():
                    return found
            except TRANSIENT:
                pass  # the page is being drawn
            if time.monotonic() > end:
                raise AssertionError(f"not seen in {seconds} s: {about or what}; the page says:\n{self.text[:3000]}")
            time.sleep(0.05)

    def wait_text(self, text: str, seconds: float = 30) -> None:
        self.wait(lambda: text in self.text, seconds, text)

    def all(self, css: str) -> list[Any]:
        return [e for e in self.driver.find_elements(By.CSS_SELECTOR, css) if e.is_displayed()]

    def one(self, css: str, seconds: float = 30) -> Any:
        return self.wait(lambda: next(iter(self.all(css)), None), seconds, css)

    def click(self, css: str) -> None:
        element = self.one(css)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def button(self, label: str) -> Any:
        """The visible button that begins with these words."""
        return self.wait(
            lambda: next((b for b in self.all("button") if b.text.strip().startswith(label)), None), about=label
        )

    def press_button(self, label: str) -> None:
        button = self.button(label)
        self.wait(button.is_enabled, about=f"{label} enabled")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()

    def tab(self, label: str) -> None:
        tab = self.wait(
            lambda: next((b for b in self.all("button[role=tab]") if b.text.strip() == label), None), about=label
        )
        tab.click()

    def open_tab(self, label: str) -> None:
        """The same where a narrow window hides it behind the three dots."""
        self.one("button[role=tab]")

        def labelled(css: str) -> list[Any]:
            return [b for b in self.all(css) if b.text.strip() == label]

        if not labelled("button[role=tab]"):
            self.click(".overflow-menu > button")
        self.wait(lambda: labelled("button[role=tab], .overflow-dropdown button"), about=label)[0].click()

    def type(self, css: str, text: str) -> None:
        element = self.one(css)
        element.clear()
        element.send_keys(text)

    def keys(self, *keys: str) -> None:
        """Keys to whatever has the focus, after it was taken off any field."""
        self.driver.execute_script("document.activeElement && document.activeElement.blur()")
        ActionChains(self.driver).send_keys(*keys).perform()

    def shift(self, key: str) -> None:
        self.driver.execute_script("document.activeElement && document.activeElement.blur()")
        ActionChains(self.driver).key_down(Keys.SHIFT).send_keys(key).key_up(Keys.SHIFT).perform()

    def screenshot(self, path: Path) -> Path:
        """The whole page, however long."""
        height = self.driver.execute_script("return document.documentElement.scrollHeight")
        width = self.driver.execute_script("return window.innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": min(height, 6000), "scale": 1}
        shot = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip, "format": "png"}
        )
        import base64

        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        return int(self.driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth"))

    def errors(self) -> list[str]:
        """What the browser's console calls severe."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def requested(self) -> list[str]:
        """Every address that was asked for since the last call."""
        import json

        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
