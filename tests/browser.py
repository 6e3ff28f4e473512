"""Reports in a browser: what does not fit a window, and how large the labels of pictures come out."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (420, 1200, 1600)
SMALLEST = 11  # pixels of a label

# Of a page in a frame: which elements lie outside of the window, and how large the labels of its pictures are.
MEASURE = """<script>
const wide = [...document.querySelectorAll("body *")].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width > 0 && !e.closest("svg svg, defs, script") && (box.right > innerWidth + 1 || box.left < -1);
});
const scale = ({a, b}) => Math.hypot(a, b);  // labels of contours are turned
const labels = [...document.querySelectorAll("svg text")];
const sizes = labels.map(e => parseFloat(getComputedStyle(e).fontSize) * scale(e.getScreenCTM()));
const scrolled = [...document.querySelectorAll("body, body *")].filter(e => e.clientWidth > 0 && !e.closest("svg")
  && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== "inline");
const dark = matchMedia("(prefers-color-scheme: dark)").matches;
parent.postMessage({dark, width: innerWidth, wide: [...wide, ...scrolled].map(e => e.outerHTML.slice(0, 80)), sizes}, "*");
</script>"""
FRAMES = """<!doctype html><pre></pre><script>
const said = [];
onmessage = event => { said.push(event.data); document.querySelector("pre").textContent = JSON.stringify(said); };
for (const width of %s) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  frame.src = "page.html";
  document.body.append(frame);
}
</script>"""


def measured(page: str, folder: Path, *, dark: bool = False) -> list[tuple[list[str], list[float]]]:
    """For each of WIDTHS, the elements that do not fit, and the sizes of the labels in pixels."""
    (folder / "page.html").write_text(page.replace("</body>", MEASURE + "</body>"))
    shown = after_scripts(FRAMES % list(WIDTHS), folder, dark=dark)
    found = re.search(r"<pre>(.*?)</pre>", shown, flags=re.DOTALL)
    assert found, shown
    answers = json.loads(html.unescape(found[1]))
    assert {said["dark"] for said in answers} == {dark}
    by_width = {said["width"]: (said["wide"], said["sizes"]) for said in answers}
    return [by_width[width] for width in WIDTHS]


def after_scripts(page: str, folder: Path, *, dark: bool = False) -> str:
    """A page as it is once its scripts have run."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    (folder / "shown.html").write_text(page)
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-sync"
    command = [CHROMIUM, *(f"--{flag}" for flag in flags.split()), "--disable-component-update"]
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000", "--dump-dom"]
    done = subprocess.run(
        [*command, (folder / "shown.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def assert_fits(page: str, folder: Path, *, dark: bool = False, labels: bool = True) -> None:
    """Of a page that has pictures, and labels in them, or none."""
    for wide, sizes in measured(page, folder, dark=dark):
        assert not wide, wide
        assert bool(sizes) == labels
        assert min(sizes, default=SMALLEST + 1) > SMALLEST
