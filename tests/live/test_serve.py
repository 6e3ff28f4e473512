"""The page of folders of runs, and what its server refuses."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser import assert_fits
from live_runs import result, runs, training, under_way

from madkernels.live.server import Server, Site, serve
from madkernels.reporting import pages
from madkernels.runs.store import FILE


@contextmanager
def served(folder: Path) -> Iterator[int]:
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def get(port: int, path: str = "/", method: str = "GET", host: str | None = None) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or f"127.0.0.1:{port}")
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


def test_a_sweep_and_what_changes_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("madkernels.live.server.REST", 0)
    store = under_way(tmp_path)
    with served(tmp_path) as port:
        status, headers, before = get(port)
        assert status == 200
        assert "5 of 8 runs are done, 1 running, 1 failed" in before
        assert "the loss is nan &lt;b&gt;" in before
        assert headers["ETag"].strip('"') in before
        store.finish(runs()[6], result(runs()[6]))
        for _ in range(100):
            later = get(port, method="HEAD")[1]["ETag"]
            if later != headers["ETag"]:
                break
            threading.Event().wait(0.05)
        assert later != headers["ETag"]
        assert "6 of 8 runs are done" in get(port)[2]
    store.close()


def test_an_unchanged_page_keeps_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("madkernels.live.server.REST", 0)
    under_way(tmp_path).close()
    site = Site(tmp_path)
    first = site._page("/", site.places())
    site.drawn.clear()
    assert site._page("/", site.places()).version == first.version


def test_several_folders(tmp_path: Path) -> None:
    under_way(tmp_path / "a & b").close()
    training(tmp_path / "text")
    (tmp_path / "other").mkdir()
    with served(tmp_path) as port:
        status, _, page = get(port)
        assert status == 200
        assert "a &amp; b" in page
        assert "step 3 of 4" in page
        (address,) = re.findall(r'href="(/a[^"]*)"', page)
        assert "5 of 8 runs are done" in get(port, address)[2]
        assert "Loss, nats per token" in get(port, "/text/")[2]
        assert get(port, "/other/")[0] == 404


@pytest.mark.parametrize(
    "path", ["/x", "/../secret", "/mad/../../secret", "/mad/..%2f..%2fsecret", "/secret", "//etc/passwd", "/mad/log.jsonl"]
)
def test_nothing_else_is_served(path: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    under_way(tmp_path / "runs/mad").close()
    with served(tmp_path / "runs") as port:
        status, _, body = get(port, path)
    assert status == 404
    assert "<pre>" not in body


HOSTS = {"localhost": 200, "LOCALHOST:1": 200, "evil.example": 403, "127.0.0.1.evil.example": 403, " ": 403}


@pytest.mark.parametrize(("host", "status"), HOSTS.items())
def test_only_by_its_own_name(host: str, status: int, tmp_path: Path) -> None:
    with served(tmp_path) as port:
        assert get(port, host=host)[0] == status


def test_a_report_is_linked_and_served_where_madkernels_wrote_it(tmp_path: Path) -> None:
    under_way(tmp_path).close()
    report = tmp_path / "report.html"
    report.write_text("another's page")
    with served(tmp_path) as port:
        assert get(port, "/report.html")[0] == 404
    report.write_text(pages.document("A report", "", [], []))
    with served(tmp_path) as port:
        assert 'href="report.html"' in get(port)[2]
        assert "A report" in get(port, "/report.html")[2]


def test_a_report_that_lies_elsewhere_is_not_served(tmp_path: Path) -> None:
    under_way(tmp_path / "runs").close()
    (tmp_path / "elsewhere.html").write_text(pages.document("A report", "", [], []))
    (tmp_path / "runs/report.html").symlink_to(tmp_path / "elsewhere.html")
    with served(tmp_path / "runs") as port:
        assert get(port, "/report.html")[0] == 404


def test_a_folder_that_is_not_there_yet_and_one_that_is_damaged(tmp_path: Path) -> None:
    with served(tmp_path / "later") as port:
        assert "There are no runs here yet." in get(port)[2]
        under_way(tmp_path / "later").close()
    (tmp_path / "later" / FILE).write_bytes(b"no database, at all" * 100)
    with served(tmp_path / "later") as port:
        status, _, page = get(port)
        assert status == 200
        assert "It cannot be read: " in page


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match=r"^--port: \d+ cannot be used: Address already in use; choose another, or 0"):
            serve(tmp_path, taken.getsockname()[1])


def test_ctrl_c_ends_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "madkernels", "serve", str(tmp_path), "--port", "0"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, text=True, env=environment, **pipes)
    assert process.stdout
    told = process.stdout.readline()
    match = re.search(r"http://127\.0\.0\.1:(\d+)/", told)
    assert match, told
    assert get(int(match[1]))[0] == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert "Traceback" not in process.stdout.read()


def test_the_pages_fit_every_window(tmp_path: Path) -> None:
    under_way(tmp_path / "mad").close()
    training(tmp_path / "text")
    site = Site(tmp_path)
    for number, address in enumerate(("/mad/", "/text/")):
        shown = tmp_path / f"shown{number}"
        shown.mkdir()
        assert_fits(site._page(address, site.places()).text, shown)
