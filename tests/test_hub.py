"""Fetching a checkpoint: a hub of our own on 127.0.0.1, and one process that asks it for all.

    OMP_NUM_THREADS=1 python -m pytest -q tests/test_hub.py

Hub below answers the three questions of huggingface_hub's snapshot_download: which commit, which
files, and their bytes. How a repository misbehaves is in its name. HF_ENDPOINT is read when
huggingface_hub is imported, so the client is a process of its own; it runs once, for all tests.
"""
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import model as qwen

ROOT = Path(qwen.__file__).parent
WEIGHTS = "model.safetensors"
CUT = 1_000_000     # bytes of the weights of org/cut that come through before the line breaks

CLIENT = """
import json, sys, time
time.sleep = lambda seconds: None           # huggingface_hub waits between its tries
sys.path.insert(0, sys.argv[1])
import model
from scale.checks import hub_advice, quiet

def ask(label, call):
    try:
        folder = call()
        answer = {file.name: file.stat().st_size for file in folder.iterdir()}
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps([label, answer]), flush=True)

def fetch(name, **more):
    def call():
        with hub_advice("org/" + name):
            return model.find_folder("org/" + name, **more)
    return call

quiet()
ask("small", fetch("plain", weights=False))
ask("whole", fetch("plain"))
ask("again", fetch("plain"))
for name in ("gated", "forbidden", "private", "missing", "cut"):
    ask(name, fetch(name))
ask("cut again", fetch("cut"))
ask("fading", fetch("fading"))
ask("down", fetch("fading"))                # from now on that repository answers 503
ask("half", fetch("half", weights=False))
ask("half down", fetch("half"))
ask("never there", fetch("down"))
ask("meta", lambda: model.load("org/meta", device="meta")[1].folder)
ask("llama", lambda: model.load("org/llama", device="cpu")[1].folder)
"""


class Hub(BaseHTTPRequestHandler):
    """GET /api/models/org/NAME/..., /org/NAME/resolve/COMMIT/FILE; the server counts what it sent.
    """
    protocol_version = "HTTP/1.1"
    refusals = {"gated": (401, "GatedRepo"), "private": (401, "RepoNotFound"),
                "missing": (404, "RepoNotFound"), "forbidden": (403, ""), "down": (503, "")}

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.path.strip("/").split("/")
        listing = parts[0] == "api"
        name = parts[3] if listing else parts[1]
        self.server.asked[name] += listing and "tree" not in parts
        gone = name in ("fading", "half") and self.server.asked[name] > 1
        code, kind = self.refusals.get("down" if gone else name, (200, ""))
        # the hub shows anybody that a gated model exists; only its files are refused
        if code != 200 and not (listing and name in ("gated", "forbidden")):
            return self.answer(b'{"error": "no"}', code, {"X-Error-Code": kind} if kind else {})
        files = self.server.files | ({"config.json": b'{"model_type": "llama"}'}
                                     if name == "llama" else {})
        if not listing:
            return self.file(name, parts[-1], files[parts[-1]])
        if "tree" in parts:
            tree = [{"type": "file", "path": file, "size": len(data), "oid": digest(data)}
                    for file, data in files.items()]
            return self.answer(json.dumps(tree).encode())
        info = {"id": f"org/{name}", "sha": digest(name.encode()), "private": False, "tags": [],
                "siblings": [{"rfilename": file} for file in files]}
        return self.answer(json.dumps(info).encode())

    def file(self, name, file, data):
        headers = {"ETag": f'"{digest(data)}"', "X-Repo-Commit": digest(name.encode())}
        if self.command == "HEAD":
            return self.answer(data, 200, headers)
        self.server.sent[name, file] += 1
        start, upto = 0, len(data)
        if self.headers.get("Range"):
            start = int(self.headers["Range"].split("=")[1].split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        # the line breaks once in the middle, then at once, until the client has given up
        if name == "cut" and file == WEIGHTS and self.server.sent[name, file] <= 7:
            upto = CUT
        self.answer(data[start:], 206 if start else 200, headers, data[start:upto])
        if upto < len(data):
            self.close_connection = True

    def answer(self, body, code=200, headers=(), sent=None):
        self.send_response(code)
        for key, value in {**dict(headers), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if sent is None else sent)


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(what the client was told, what the hub sent: (repository, file) -> times, stderr)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {path.name: path.read_bytes() for path in sorted(qwen.TINY.iterdir())}
    server.sent, server.asked = Counter(), Counter()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hidden = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE")
    env = {k: v for k, v in os.environ.items() if not k.startswith(hidden)} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "127.0.0.1",
        "HF_HOME": str(tmp_path_factory.mktemp("hub")), "HF_HUB_DISABLE_TELEMETRY": "1"}
    try:
        got = subprocess.run([sys.executable, "-c", CLIENT, str(ROOT)], env=env, text=True,
                             capture_output=True, timeout=300)
    finally:
        server.shutdown()
        server.server_close()
    assert got.returncode == 0, got.stderr
    answers = dict(json.loads(line) for line in got.stdout.splitlines() if line.startswith("["))
    return answers, server.sent, got.stderr


def test_the_small_files_come_without_the_weights(hub):
    """Everything was fetched first and checked afterwards: a wrong name of a class, a vocabulary
    that does not fit, were found after 45 minutes of download."""
    answers, sent, _ = hub
    files = {path.name: path.stat().st_size for path in qwen.TINY.iterdir()}
    assert answers["whole"] == answers["again"] == files
    assert answers["small"] == {k: v for k, v in files.items() if k != WEIGHTS}
    assert {sent["plain", name] for name in files} == {1}       # and what is there comes from there


def test_a_process_that_is_sent_its_weights_fetches_none(hub):
    """Each rank's machine fetched the weights, although rank 0 alone reads them."""
    answers, sent, _ = hub
    assert "config.json" in answers["meta"] and not sent["meta", WEIGHTS]


def test_another_class_is_refused_before_its_weights_are_fetched(hub):
    answers, sent, _ = hub
    assert "model_type is 'llama'" in answers["llama"]
    assert sent["llama", "config.json"] and not sent["llama", WEIGHTS]


@pytest.mark.parametrize("name, advice", [
    ("gated", r"accept the licence on http.*/org/gated and log in with `hf auth login`"),
    ("forbidden", r"accept the licence on http.*/org/forbidden and log in with `hf auth login`"),
    ("private", "check the name, or log in with `hf auth login`"),
    ("missing", "check the name, or log in with `hf auth login`"),
    ("cut", "run again, .* goes on where it was cut"),
    ("half down", "run again"), ("never there", "run again")])
def test_what_the_hub_refuses_says_what_to_do(hub, name, advice):
    """The first line of the hub's own message was shown: "GatedRepoError: 401 Client Error."."""
    text = hub[0][name]
    assert isinstance(text, str) and text.startswith("ConnectionError: cannot get org/")
    assert re.search(advice, text) and "\n" not in text and str(qwen.TINY) in text


def test_a_cut_download_goes_on_where_it_was_cut(hub):
    answers, sent, _ = hub
    assert answers["cut again"] == answers["whole"] and sent["cut", WEIGHTS] == 8


def test_a_hub_that_is_down_is_not_needed_for_what_is_there(hub):
    answers, _, _ = hub
    assert answers["down"] == answers["fading"] == answers["whole"]
    assert WEIGHTS not in answers["half"]


def test_downloads_show_their_bar_after_quiet(hub):
    """quiet() switched the hub's bars off too: nothing on the screen for 45 minutes."""
    assert "100%" in hub[2]
