"""A real JupyterLab in a real browser, for tests: `with lab(folder) as server, browser() as tab: ...`."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SETTINGS = {
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},  # every cell is in the page
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
}


@contextmanager
def lab(folder: Path, home: Path) -> Iterator[str]:
    """JupyterLab on a free port of loopback, showing `folder`. Gives the address of its page, `{}` for a file.

    home: an empty folder for its settings and state, so that the user's own play no part.
    """
    for name, setting in SETTINGS.items():
        file = home / "settings" / f"{name.replace(':', '/')}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(setting))
    environment = os.environ | {
        "JUPYTER_PREFER_ENV_PATH": "1",
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "IPYTHONDIR": str(home / "ipython"),
    }
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
        "--ServerApp.port=0", f"--ServerApp.root_dir={folder}", "--LabApp.news_url=",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    with open(home / "lab.log", "w") as log:
        server = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield _address(home / "runtime" / f"jpserver-{server.pid}.json", server, home / "lab.log")
    finally:
        server.terminate()  # ends its kernels, too
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _address(file: Path, server: subprocess.Popen, log: Path) -> str:
    """The server writes its port and token once it listens."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            told = json.loads(file.read_text())
            return f"http://127.0.0.1:{told['port']}/lab/tree/{{}}?reset&token={told['token']}"
        except (FileNotFoundError, json.JSONDecodeError):
            time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


@dataclass
class Tab:
    """One page of the browser, and what it did that it should not."""

    page: object  # playwright's
    errors: list[str] = field(default_factory=list)  # of the console, and uncaught ones
    outside: list[str] = field(default_factory=list)  # requests that would leave this machine

    def open(self, address: str) -> None:
        """A notebook, until its kernel is there (what is run before that is dropped in silence)."""
        self.page.goto(address)
        self.page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=60_000)
        self.page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)

    def run_all(self, seconds: float) -> None:
        """Run every cell and wait until the last one is done."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        self.page.wait_for_function(
            """() => { const found = document.querySelectorAll(".jp-Notebook .jp-CodeCell .jp-InputArea-prompt");
                const prompts = [...found].map(p => p.textContent);  // a folded cell has none
                return prompts.length > 0 && prompts.every(p => /\\[\\d+\\]/.test(p)); }""",
            timeout=seconds * 1000,
        )
        self.page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=10_000)

    def tracebacks(self) -> list[str]:
        """What the cells raised."""
        mime = "application/vnd.jupyter.error"
        return self.page.locator(f'.jp-RenderedText[data-mime-type="{mime}"]').all_inner_texts()


@contextmanager
def browser() -> Iterator[Tab]:
    """Chromium with a new profile and one tab, ended with all its processes."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as player:
        chromium = player.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = chromium.new_page(viewport={"width": 1200, "height": 1000})
        tab = Tab(page)

        def note(url: str) -> None:
            parts = urlsplit(url)
            if parts.scheme in ("http", "https", "ws", "wss") and parts.hostname not in ("127.0.0.1", "localhost"):
                tab.outside.append(url)

        page.on("console", lambda message: message.type == "error" and tab.errors.append(message.text))
        page.on("pageerror", lambda error: tab.errors.append(str(error)))
        page.on("request", lambda request: note(request.url))
        page.on("websocket", lambda socket: note(socket.url))
        try:
            yield tab
        finally:
            chromium.close()
