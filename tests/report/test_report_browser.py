"""The page in a real browser: no error, tables and charts with a size, nothing wider than the window."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from limbeck.report import write_report

CATCH = """<script>
window.problems = [];
addEventListener("error", (event) => problems.push(String(event.message)));
for (const kind of ["error", "warn"]) console[kind] = (...words) => problems.push(words.join(" "));
</script>"""
# Chromium's own window is never narrower than 500 px.
FRAME = (
    '<html style="color-scheme: light dark"><body><iframe style="width: {}px; height: 2000px; border: 0" srcdoc="{}">'
)
PROBE = """<script>
const size = (element) => { const box = element.getBoundingClientRect(); return [box.width, box.height]; };
const sizes = (selector) => [...document.querySelectorAll(selector)].map(size);
document.querySelectorAll("details").forEach((element) => { element.open = true; });
const plot = document.querySelector(".plot"), box = plot.getBoundingClientRect();
plot.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 9 }));
const found = {
  problems, width: innerWidth, scroll: document.documentElement.scrollWidth,
  background: getComputedStyle(document.body).backgroundColor,
  tables: sizes("table"), plots: sizes(".plot > svg"), curves: sizes(".plot path.bold"), tip: sizes(".plot .tip")[0],
  dots: sizes("#main-chart .mark path"), whiskers: sizes("#main-chart .whisker"), bars: sizes(".bar span"),
  hover: plot.querySelector(".tip").innerText, rows: document.querySelectorAll("#results tbody tr").length,
  small: [...document.querySelectorAll("text, td, th, p, span, small, pre")].filter(
    (element) => element.textContent.trim() && !element.matches(".slim") &&
      parseFloat(getComputedStyle(element).fontSize) < 11).length,
};
const answer = parent.document.body.appendChild(parent.document.createElement("pre"));
answer.id = "probe";
answer.textContent = JSON.stringify(found);
</script>"""


def browse(page: Path, tmp_path: Path, width: int, *, dark: bool) -> dict[str, Any]:
    """What the probe found in headless Chromium, and what the browser's console said."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("not run: Chromium is not installed, so the report was not opened in a browser")
    text = page.read_text(encoding="utf-8")
    probed = tmp_path / "probed.html"
    text = text.replace("<head>", f"<head>{CATCH}").replace("</body>", f"{PROBE}</body>")
    probed.write_text('<meta charset="utf-8">' + FRAME.format(width, html.escape(text)), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --dump-dom"
    command = [browser, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,2100"]
    if dark:
        command.append("--blink-settings=preferredColorScheme=0")
    done = subprocess.run([*command, probed.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    match = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return {**json.loads(html.unescape(match[1])), "console": console}


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (420, True)])
def test_comparison_in_a_browser(compare_folder: Path, tmp_path: Path, width: int, dark: bool) -> None:
    found = browse(write_report(compare_folder), tmp_path, width, dark=dark)
    assert found["problems"] == [] and found["console"] == []
    assert found["width"] == width and found["scroll"] <= width
    assert found["rows"] == 7
    assert len(found["plots"]) == 16
    assert len(found["curves"]) == 5 * 16
    for kind, least in (("tables", 200), ("plots", 150), ("curves", 100), ("dots", 5), ("whiskers", 5), ("bars", 2)):
        assert found[kind] and all(size[0] >= least for size in found[kind]), kind
    assert all(size[1] >= 100 for size in found["plots"] + found["tables"])
    assert min(found["tip"]) > 50
    assert found["hover"].startswith("step 100") and "MiniLLM" in found["hover"]
    assert found["small"] == 0
    lightness = sum(map(int, re.findall(r"\d+", found["background"])[:3]))
    assert lightness < 120 if dark else lightness > 700


def test_one_run_in_a_browser(run_folder: Path, tmp_path: Path) -> None:
    found = browse(write_report(run_folder), tmp_path, 800, dark=False)
    assert found["problems"] == [] and found["console"] == []
    assert found["rows"] == 3 and found["scroll"] <= 800
    assert len(found["curves"]) == len(found["plots"]) == 16
