"""The benchmarks of endurance, as far as they can be seen without a server of vLLM."""

import json
import random
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.language import bench_endurance, bench_mutations
from benchmarks.language.soak import Load, slope, soak, unfinished
from benchmarks.lib.render import markdown


class _Answers(BaseHTTPRequestHandler):
    """Streams as many tokens as the body says, or what its prompt says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send("200 OK", b'vllm:num_requests_running{engine="0"} 2.0\n'
                  b'vllm:num_requests_waiting{engine="0"} 1.0\n')  # fmt: skip

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind, tokens = body["prompt"], body["max_tokens"]
        if kind == "refused":
            self.send("500 Internal", b"{}")
            return
        lines = [json.dumps({"choices": [{"text": "x" * 2000}]}) for _ in range(tokens)]
        if kind == "error":
            lines = [json.dumps({"error": {"message": "no memory"}})]
        usage = {"completion_tokens": tokens - (kind == "short")}
        lines += [] if kind == "error" else [json.dumps({"choices": [], "usage": usage})]
        lines += [] if kind == "torn" else ["[DONE]"]
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for line in lines:
                self.wfile.write(f"data: {line}\n\n".encode())
        except OSError:
            pass  # the client has left
        self.close_connection = True

    def send(self, status, text):
        self.send_response(int(status.split()[0]))
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_clients_of_a_good_server(url):
    load = Load(["good"], clients=6, seconds=0.3, tokens=(16, 64))
    traffic = soak(url, load)
    assert traffic.errors == []
    assert traffic.whole
    assert traffic.left
    assert traffic.whole * 16 <= traffic.tokens <= traffic.whole * 64


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("refused", "500"),
        ("error", "no memory"),
        ("short", "tokens instead of"),
        ("torn", r"ended without \[DONE\]"),
    ],
)
def test_every_bad_answer_is_an_error(url, kind, sentence):
    traffic = soak(url, Load([kind], clients=2, seconds=0.2, tokens=(40, 64)))
    assert traffic.whole == 0
    assert traffic.errors
    assert any(re.search(sentence, error) for error in traffic.errors)


def test_unfinished_requests_are_counted(url):
    assert unfinished(url, 0) == 3


def test_a_slope_and_its_error():
    draw = random.Random(0)
    seconds = [float(s) for s in range(300)]
    noise = [draw.gauss(0, 5) for _ in seconds]
    flat, error = slope(seconds, [100 + n for n in noise])
    assert abs(flat) < 3 * error
    rising, error = slope(seconds, [100 + 0.5 * s + n for s, n in zip(seconds, noise, strict=True)])
    assert abs(rising - 0.5) < 3 * error
    assert rising > 10 * error
    with pytest.raises(ValueError, match="takes three"):
        slope([0.0, 1.0], [1.0, 2.0])


def test_tables_of_a_soak_show_what_was_wrong():
    row = {
        "whole": 1200,
        "left_early": 600,
        "errors": 1,
        "logged_errors": 2,
        "slope_mb_per_min": -0.125,
        "slope_standard_error": 0.5,
        "memory_mb": [2000.0, 2001.0],
        "same_answers": 15,
        "asked": 16,
    }
    table = bench_endurance.tables({"served": {"W4A4, packed": row}})["soak"]
    assert table[1] == [
        *("W4A4, packed", "1,200", "600", "3", "-0.12 ± 0.50", "2,001 MB", "15 of 16")
    ]
    assert markdown(table)


def test_tables_of_mutations_add_up():
    kinds = {"data: bits": {"right": 3, "refused": 1}, "index: text": {"refused": 5, "hang": 1}}
    table = bench_mutations.tables({"kinds": kinds})["outcomes"]
    assert table[1:] == [
        ["data: bits", "4", "1", "3", "0", "0", "0"],
        ["index: text", "6", "5", "0", "0", "0", "1"],
        ["all", "10", "6", "3", "0", "0", "1"],
    ]
