"""Pictures of a report's page, on a desk and on a phone, by day and by night, in print.

    python -m rmprune report runs/page-slim runs/page-amc --out reports/page
    python experiments/page_screenshots.py reports/page

Needs the `browser` extra and an installed chromium.
"""

import io
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Page, sync_playwright

SHOTS = {  # name: width, colours, medium
    "desk-light": (1280, "light", "screen"),
    "desk-dark": (1280, "dark", "screen"),
    "phone-light": (390, "light", "screen"),
    "phone-dark": (390, "dark", "screen"),
    "print": (800, "light", "print"),
}


def main(folder: Path) -> None:
    """Writes `folder`/desk-light.png and the others, of `folder`/index.html."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, (width, scheme, medium) in SHOTS.items():
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.emulate_media(media=medium, color_scheme=scheme)
            page.goto((folder / "index.html").resolve().as_uri())
            page.wait_for_selector("html[data-ready]")
            choose(page)
            shot = Image.open(io.BytesIO(page.screenshot(full_page=True)))
            indexed(shot.convert("RGB")).save(folder / f"{name}.png", optimize=True)
        browser.close()


def indexed(image: Image.Image) -> Image.Image:
    """The image in its 256 most frequent colours, which stay as they are: a fourth of the size."""
    pixels = np.asarray(image, np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    colours, places, counts = np.unique(pixels, return_inverse=True, return_counts=True)
    values = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=1).astype(int)
    palette = values[np.argsort(-counts)[:256]]
    nearest = np.abs(values[:, None] - palette).sum(axis=2).argmin(axis=1).astype(np.uint8)
    few = Image.fromarray(nearest[places].reshape(pixels.shape))
    few.putpalette(palette.astype(np.uint8).tobytes())
    return few


def choose(page: Page) -> None:
    """A network chosen in the chart, and its layers drawn."""
    chosen = page.locator("#chart .dot[aria-label^='mixed-collapse']").first
    chosen.focus()
    page.keyboard.press("Enter")
    if page.get_by_role("button", name="its layers").is_visible():
        page.get_by_role("button", name="its layers").click()
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
