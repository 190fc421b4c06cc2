"""Every notebook in a real JupyterLab in headless Chromium: opened, its exercises solved, "Run All", looked at.

One server and one page for each worker. Solutions are put in here, and not in a run of their own, since the step of the
suite before this one has run every notebook with its exercises untouched."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from tests.notebooks.test_solved import CHROMIUM, said
from tools import notebooks

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed (Debian: apt-get install chromium)")

NOTEBOOKS = sorted(notebooks.FOLDER.glob("[0-9]*.ipynb"))
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
SETTINGS = {"@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
            "@jupyterlab/docmanager-extension/plugin": {"autosave": False}}

# Driven by commands, not by clicks: the promise of run-all resolves when every cell has run.
RUN = """async ([path, solutions, limit]) => {
  const app = window.jupyterapp;
  const panel = await app.commands.execute('docmanager:open', {path, factory: 'Notebook'});
  await panel.context.ready;
  await panel.sessionContext.ready;
  await panel.sessionContext.session.kernel.info;
  for (const [k, solution] of solutions) panel.content.model.cells.get(k).sharedModel.setSource(solution);
  const late = new Promise((_, no) => setTimeout(() => no(new Error('the run took too long')), limit));
  await Promise.race([app.commands.execute('notebook:run-all-cells'), late]);
}"""
DRAWN = """() => window.jupyterapp.shell.currentWidget.content.widgets.every(cell => !cell.isPlaceholder())"""
CELLS = """() => window.jupyterapp.shell.currentWidget.content.model.sharedModel.toJSON().cells"""
PICTURES = """() => [...window.jupyterapp.shell.currentWidget.node.querySelectorAll('.jp-Cell img')]
    .map(image => [image.alt || '', image.complete && image.naturalWidth > 0])"""
SCROLL = """k => window.jupyterapp.shell.currentWidget.content.scrollToItem(k, 'center')"""
CLOSE = """async () => {
  const panel = window.jupyterapp.shell.currentWidget;
  await panel.sessionContext.shutdown();
  panel.dispose();
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A JupyterLab on a copy of the notebooks, with settings of its own; gives its address and token."""
    own = tmp_path_factory.mktemp("jupyter")
    for name, values in SETTINGS.items():
        file = own / "settings" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    shutil.copytree(notebooks.FOLDER, own / "notebooks", ignore=shutil.ignore_patterns(".*"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    env = os.environ | {"JUPYTER_CONFIG_DIR": str(own / "config"), "JUPYTER_RUNTIME_DIR": str(own / "runtime"),
                        "JUPYTERLAB_SETTINGS_DIR": str(own / "settings"),
                        "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces")}
    with (own / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--IdentityProvider.token={token}",
             f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--ServerApp.ip=127.0.0.1",
             f"--ServerApp.root_dir={own / 'notebooks'}", "--LabApp.news_url=", "--LabApp.expose_app_in_browser=True",
             "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"],
            env=env, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api?token={token}", timeout=1)
                break
            except (OSError, urllib.error.URLError):
                assert process.poll() is None, (own / "log").read_text()
                time.sleep(0.25)
        yield address, token
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def page(server):
    """The one page, which notes page errors and every request that leaves this machine."""
    address, token = server
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1000, "height": 1300})
        page.wrong = []
        page.on("pageerror", lambda error: page.wrong.append(f"page error: {error}"))
        page.on("request", lambda request: page.wrong.append(f"external request: {request.url}")
                if not request.url.startswith((address, "data:", "blob:")) else None)
        page.on("websocket", lambda opened: page.wrong.append(f"external socket: {opened.url}")
                if not opened.url.startswith(address.replace("http", "ws")) else None)
        page.goto(f"{address}/lab?token={token}&reset")
        page.wait_for_function("() => window.jupyterapp?.shell?.isAttached", timeout=120_000)
        page.evaluate("() => window.jupyterapp.started")
        yield page
        browser.close()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_run_all_in_jupyterlab(page, path, record_property):
    exercises = notebooks.exercises(notebooks.read(path))
    page.wrong.clear()
    page.set_default_timeout(360_000)
    page.evaluate(RUN, [path.name, [[exercise.stub, exercise.solution] for exercise in exercises], 300_000])
    everything = page.evaluate(CELLS)
    cells = [cell for cell in everything if cell["cell_type"] == "code" and cell["source"]]
    errors = [output for cell in cells if "raises-exception" not in cell["metadata"].get("tags", [])
              for output in cell["outputs"] if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert not errors
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))  # all of them ran, just now
    verdicts = {exercise.name: said(everything[exercise.check]) for exercise in exercises}
    assert not {name: text for name, text in verdicts.items() if not text.startswith("✔ right: ")}
    page.wait_for_function(DRAWN)  # JupyterLab draws when it is idle what is far out of sight
    stored = [output for cell in notebooks.read(path).cells if cell.cell_type == "code" for output in cell.outputs
              if "image/png" in output.get("data", {})]
    pictures = page.evaluate(PICTURES)
    assert len(pictures) >= len(stored)
    assert all(alt.strip() and "No description" not in alt and drawn for alt, drawn in pictures), pictures
    for k, cell in enumerate(everything):
        if "IntSlider(" in cell["source"]:
            page.evaluate(SCROLL, k)
            shown = page.locator(".jp-Cell", has=page.locator(".noUi-handle"))
            picture = shown.locator("img")
            before = picture.get_attribute("src", timeout=20_000)
            shown.locator(".noUi-handle").press("ArrowRight", timeout=20_000)
            playwright.expect(picture).not_to_have_attribute("src", before, timeout=20_000)
    page.evaluate(CLOSE)
    assert not page.wrong
    record_property("notebooks run in a browser", 1)
    record_property("exercises solved in a notebook that runs from top to bottom", len(exercises))
