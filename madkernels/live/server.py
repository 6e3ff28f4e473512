"""A small server of this machine alone that shows folders of runs: pages of how far they are, and the reports in them.

An address is looked up among those that there are; no path is made of what a browser asks for. Pages are drawn when one
asks, and no oftener than costs a small share of the machine's time, since the runs need that.
"""

from __future__ import annotations

import hashlib
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast
from urllib.parse import quote, unquote

from madkernels.live.page import sections_of
from madkernels.live.watched import Seen, Watched, folders_in, holds_runs
from madkernels.reporting import pages
from madkernels.reporting.pages import Section

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")  # that a browser may call this server by: another one's name may be made to point here
REPORT = "report.html"
REST = 9  # times what it took to draw a page pass before it is drawn again
LEAST_REST = 1.0  # seconds that pass at the least
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


def serve(folder: Path, port: int) -> None:
    """Shows a folder of runs, or one that holds several, until Ctrl-C.

    Raises:
        ValueError: the port is taken, or not allowed.
    """
    try:
        server = Server(folder, port)
    except OSError as error:
        raise ValueError(
            f"--port: {port} cannot be used: {error.strerror}; choose another, or 0 for one that is free"
        ) from None
    print(f"{folder}: http://{HOST}:{server.server_port}/ (Ctrl-C ends it)", flush=True)
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()


class Server(ThreadingHTTPServer):
    """Answers on `HOST`; port 0 takes one that is free."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.site = Site(folder)
        super().__init__((HOST, port), _Handler)


@dataclass(frozen=True)
class Drawn:
    """A page, its version, and when it may be drawn again (of time.monotonic)."""

    text: str
    version: str
    until: float


class Site:
    """The pages of a folder, by the address that they have."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.watched: dict[Path, Watched] = {}
        self.drawn: dict[str, Drawn] = {}
        self.lock = threading.Lock()  # matplotlib draws for one at a time

    def page(self, address: str) -> Drawn | bytes | None:
        """What is at an address such as / or /name/: a page, or the bytes of a report; None: nothing."""
        places = self.places()
        if address in places or address == "/":
            with self.lock:
                return self._page(address, places)
        place, _, name = address.rpartition("/")
        folder = places.get(f"{place}/")
        return report_in(folder, self.folder) if folder and name == REPORT else None

    def places(self) -> dict[str, Path]:
        """The folders of runs, by address: the folder itself, or those in it."""
        found = folders_in(self.folder)
        return {"/" if folder == self.folder else f"/{folder.name}/": folder for folder in found}

    def _page(self, address: str, places: dict[str, Path]) -> Drawn:
        known, begun = self.drawn.get(address), time.monotonic()
        if known and begun < known.until:
            return known
        title, facts, gaps, sections = self._one(places[address]) if address in places else self._all(places)
        whole = pages.document(title, facts, gaps, sections)
        version = f'"{hashlib.sha256(whole.encode()).hexdigest()[:16]}"'
        text = pages.document(title, facts, gaps, sections, version=version)
        ended = time.monotonic()
        self.drawn[address] = Drawn(text, version, ended + max(LEAST_REST, REST * (ended - begun)))
        return self.drawn[address]

    def _one(self, folder: Path) -> tuple[str, str, list[str], list[Section | None]]:
        seen = self._see(folder)
        if isinstance(seen, str):
            return folder.name, seen, [], []
        facts, sections = f"{seen.kind}: {seen.line}.", sections_of(seen)
        if report_in(folder, self.folder) is not None:
            sections.append(Section("Report", [pages.link("The report that was written of these runs", REPORT)]))
        return folder.resolve().name, facts, seen.failed, sections

    def _all(self, places: dict[str, Path]) -> tuple[str, str, list[str], list[Section | None]]:
        lines = []
        for address, folder in places.items():
            seen = self._see(folder)
            kind, told = ("-", seen) if isinstance(seen, str) else (seen.kind, seen.line)
            lines.append([pages.link(folder.name, quote(address)), kind, told])
        section = Section("Runs", [pages.table(["folder", "kind", "status"], lines)])
        return self.folder.resolve().name, f"{len(places)} folder{'s' * (len(places) != 1)} of runs.", [], [section]

    def _see(self, folder: Path) -> Seen | str:
        """What is there, or why that cannot be said; whatever one damaged file brings, the server goes on."""
        if not holds_runs(folder):
            return "There are no runs here yet."
        try:
            return self.watched.setdefault(folder, Watched(folder)).see()
        except Exception as error:
            return (
                f"It cannot be read: {error}"
                if isinstance(error, (ValueError, OSError))
                else f"It cannot be read: {error!r}"
            )


def report_in(folder: Path, within: Path) -> bytes | None:
    """The report of a folder, where there is one that madkernels wrote and that lies in what is shown."""
    path = folder / REPORT
    with suppress(OSError):
        if path.resolve().is_relative_to(within.resolve()) and pages.is_page(path):
            return path.read_bytes()
    return None


class _Handler(BaseHTTPRequestHandler):
    timeout = 30.0  # seconds that a silent client holds a thread

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        if not self._is_for_us():
            self.send_error(HTTPStatus.FORBIDDEN, f"This server is called {' or '.join(NAMES)}")
            return
        found = cast(Server, self.server).site.page(unquote(self.path.partition("?")[0]))
        if found is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        body = found.text.encode() if isinstance(found, Drawn) else found
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        if isinstance(found, Drawn):
            self.send_header("ETag", found.version)
        self.end_headers()
        if with_body:
            with suppress(ConnectionError):  # the browser has left
                self.wfile.write(body)

    def _is_for_us(self) -> bool:
        """A page of another origin whose name was made to point here still gives that name. The port may be a tunnel's."""
        return self.headers.get("Host", "").partition(":")[0].lower() in NAMES

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing of single requests."""
