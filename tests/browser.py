"""Opens a page in Chromium (Qt WebEngine, from its wheel), in a process of its own: what it asked for, said and drew.

`python browser.py PAGE PROBE [SHOT.png]` runs the JavaScript in the file PROBE once PAGE has loaded, and prints one
JSON object: `result` (what the probe's last expression gives, as JSON text), `console` (messages) and `requests`
(addresses asked for, the page's own apart). With SHOT.png the whole page is drawn into it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 1024, 900
_FLAGS = "--disable-gpu --disable-dev-shm-usage --no-sandbox"
_TIMEOUT_S = 240


class NoBrowser(Exception):
    """The browser does not start here; the message says what it said."""


def open_page(page: Path, probe: str, shot: Path | None = None) -> dict[str, Any]:
    """Open a page, run a probe in it, and return what this module's description says, `result` parsed.

    Raises:
        NoBrowser: it does not start, for example for want of a system library.
    """
    script = page.with_suffix(".probe.js")
    script.write_text(probe)
    command = [sys.executable, __file__, str(page), str(script), *([str(shot)] if shot else [])]
    environment = os.environ | {
        "QT_QPA_PLATFORM": "offscreen",
        "QTWEBENGINE_CHROMIUM_FLAGS": _FLAGS,
        "QTWEBENGINE_DISABLE_SANDBOX": "1",
        "QT_LOGGING_RULES": "*=false",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        raise NoBrowser(
            f"Qt WebEngine failed with status {done.returncode}; CONTRIBUTING.md lists the libraries that it needs: "
            f"{done.stderr[-2000:]}"
        )
    found: dict[str, Any] = json.loads(done.stdout)
    found["result"] = json.loads(found["result"])
    return found


def _main(page: str, probe: str, shot: str | None) -> int:
    from PySide6.QtCore import QTimer, QUrl
    from PySide6.QtGui import QImage, QPainter
    from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineUrlRequestInterceptor
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication

    app = QApplication(sys.argv[:1])
    messages: list[str] = []
    requests: list[str] = []
    address = QUrl.fromLocalFile(str(Path(page).resolve()))

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:
            messages.append(message)

    class Interceptor(QWebEngineUrlRequestInterceptor):
        def interceptRequest(self, info: Any) -> None:
            if info.requestUrl() != address:
                requests.append(info.requestUrl().toString())

    view = QWebEngineView()
    interceptor, shown = Interceptor(), Page(view)
    shown.setUrlRequestInterceptor(interceptor)
    view.setPage(shown)
    view.resize(WIDTH, HEIGHT)

    def finished(result: object) -> None:
        print(json.dumps({"result": result, "console": messages, "requests": requests}))
        if shot is None:
            app.quit()
        else:
            shown.runJavaScript("document.documentElement.scrollHeight", 0, lambda height: photograph(int(height)))

    def photograph(height: int) -> None:
        """The page window by window, as only what is in the window is drawn."""
        whole = QImage(WIDTH, height, QImage.Format.Format_RGB32)

        def take(top: int) -> None:
            painter = QPainter(whole)
            painter.drawPixmap(0, top, view.grab())
            painter.end()
            if top + HEIGHT >= height:
                whole.save(shot)
                app.quit()
            else:
                turn_to(min(top + HEIGHT, height - HEIGHT))

        def turn_to(top: int) -> None:
            shown.runJavaScript(f"window.scrollTo(0, {top})", 0)
            QTimer.singleShot(400, lambda: take(top))

        turn_to(0)

    def loaded(ok: bool) -> None:
        if not ok:
            print(f"{page} did not load", file=sys.stderr)
            app.exit(1)
            return
        shown.runJavaScript(Path(probe).read_text(), 0, finished)

    shown.loadFinished.connect(loaded)
    view.load(address)
    view.show()
    return int(app.exec())


if __name__ == "__main__":
    status = _main(sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None)
    sys.stdout.flush()
    os._exit(status)  # Qt's own teardown may crash once the page is gone
