"""Generation over HTTP: a server of ours in another process, slow, failing, or talking nonsense."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepshot.assets import AssetStore
from keepshot.client import Client
from keepshot.errors import ConfigError, ModelError
from keepshot.jobs.measure import measure_models
from keepshot.jobs.specs import MeasureSpec
from keepshot.models.loading import save
from keepshot.progress import Silent
from keepshot.scoring.engine import Engine
from keepshot.scoring.request import Generate, GreedyMatch, LogLikelihood
from keepshot.scoring.server import ServedEngine, Server
from pico import pico_model

SERVER = textwrap.dedent('''
    """Echoes the prompt's last word; misbehaves as the word asks for."""
    import json, sys, time
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from threading import Lock

    lock, now, most, seen = Lock(), 0, 0, {}

    class Handler(BaseHTTPRequestHandler):
        def answer(self, content, status=200):
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            if self.path == "/v1/models":
                self.answer({"data": [{"id": name} for name in sys.argv[1].split(",")]})
            else:
                self.answer({"most": most, "seen": seen})

        def do_POST(self):
            global now, most
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            word = body["prompt"].split()[-1]
            with lock:
                now, seen[word] = now + 1, seen.get(word, 0) + 1
                most, count = max(most, now), seen[word]
            time.sleep(0.05)
            with lock:
                now -= 1
            assert (body["temperature"], body.get("seed")) in ((0.0, None), (0.7, 5))
            if word == "flaky" and count < 3:
                return self.answer({"error": "busy"}, 503)
            if word == "down":
                return self.answer({"error": "broken"}, 500)
            if word == "slow":
                time.sleep(5)
            if word == "nonsense":
                return self.answer({"choices": []})
            if word == "html":
                return self.answer(b"<html>")
            if word == "refused":
                return self.answer({"error": "no such model"}, 404)
            reason = "length" if word == "endless" else "stop"
            self.answer({"choices": [{"text": f" {word}\\nQ: more", "finish_reason": reason}]})

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
''')


@pytest.fixture
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    names = getattr(request, "param", "pico")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, names], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    process.kill()
    process.wait()
    process.stdout.close()


def patient(url: str) -> Server:
    return Server(url, timeout=2.0, tries=4, in_flight=3, pause=0.01)


def ask(word: str) -> GreedyMatch:
    model = pico_model("llama")
    return GreedyMatch(tuple(model.encode(f"Q: {word}")), tuple(model.encode_plain(f" {word}")))


def statistics(url: str) -> dict[str, object]:
    return Client(f"{url}/v1").ask("statistics", None, "statistics", dict)


def test_generation_goes_out_and_likelihoods_stay(address: str) -> None:
    model = pico_model("llama")
    likelihood = LogLikelihood(tuple(model.encode("Q: a")), tuple(model.encode_plain(" b")))
    words = [f"w{n}" for n in range(12)]
    stops = Generate(tuple(model.encode("Q: xyz")), 9, ("z",))
    requests = [likelihood, *map(ask, words), stops, ask("flaky")]
    found = ServedEngine(model, patient(address)).run(requests)
    assert found[0] == Engine(model).run([likelihood])[0]
    for result, word in zip(found[1:13], words, strict=True):
        assert (result.correct, result.text, result.stopped) == (True, f" {word}", True)  # type: ignore[union-attr]
    assert (found[13].text, found[13].stopped) == (" xy", True)  # type: ignore[union-attr]
    assert found[14].correct  # type: ignore[union-attr]
    told = statistics(address)
    assert told["most"] == 3, "three in flight, no more and no fewer"
    assert told["seen"]["flaky"] == 3  # type: ignore[index]


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("down", "no answer to the prompt that ends in 'Q: down' after 4 tries: HTTP 500"),
        ("html", "after 4 tries: it answered something that is not JSON"),
        (
            "nonsense",
            r"to the prompt that ends in 'Q: nonsense' after 4 tries: it answered nonsense",
        ),
        ("refused", "refused the prompt that ends in 'Q: refused': HTTP 404"),
    ],
)
def test_failures_name_the_request_and_keep_what_is_finished(
    address: str, tmp_path: Path, word: str, reason: str
) -> None:
    model, kept = pico_model("llama"), tmp_path / "served.jsonl"
    good = [ask(f"w{n}") for n in range(4)]
    with pytest.raises(ModelError, match=reason):
        ServedEngine(model, patient(address), kept=kept).run([*good, ask(word)])
    kept.write_text(kept.read_text("utf-8") + '{"key": "cut o', encoding="utf-8")
    found = ServedEngine(model, patient(address), kept=kept).run(good)
    assert all(result.correct for result in found)  # type: ignore[union-attr]
    assert statistics(address)["seen"]["w0"] == 1, "asked once"  # type: ignore[index]


def test_slow_server_is_given_up_in_time(address: str) -> None:
    server = Server(address, timeout=0.3, tries=2, pause=0.01)
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"after 2 tries: .*timed out"):
        server.complete("Q: slow", 5, ())
    assert time.monotonic() - started < 3


def test_an_answer_without_an_end_has_not_stopped(address: str) -> None:
    assert not patient(address).complete("Q: endless", 5, ()).stopped
    assert patient(address).complete("Q: endless", 5, ("\n",)).stopped  # cut here


def test_server_that_is_not_there() -> None:
    with pytest.raises(ModelError, match=r"gave no answer to the list of models after 2 tries"):
        Server("http://127.0.0.1:9", tries=2, pause=0.01).model_name()
    with pytest.raises(ConfigError, match="expected an address such as http"):
        Server("localhost:8000").model_name()


@pytest.mark.parametrize("address", ["a,b"], indirect=True)
def test_several_models_need_a_name(address: str) -> None:
    with pytest.raises(ConfigError, match=r"has 2 models \(a, b\); say which one"):
        Server(address).model_name()
    assert Server(f"{address}/v1/", model="b").complete("x", 3, ()).text.startswith(" x")


def test_measure_sends_exact_tasks_to_the_server(
    address: str, tmp_path: Path, store: AssetStore
) -> None:
    save(pico_model("llama"), tmp_path / "model")
    rows = [{"input": f"say word{n}", "output": f"word{n}"} for n in range(8)]
    file = tmp_path / "echo.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    spec = MeasureSpec(
        models=(str(tmp_path / "model"),), tasks=(str(file),), shots=(0,), seeds=1,
        template="input-output", server=address,
    )  # fmt: skip
    measured = measure_models(spec, store, None, Silent())
    assert {row.answer for row in measured.items} == {"Output:"}, "the prompt's last word"
    many = spec.model_copy(update={"models": (*spec.models, "other")})
    with pytest.raises(ConfigError, match="serves one model"):
        measure_models(many, store, None, Silent())


def test_a_temperature_and_its_seed_reach_the_server(address: str) -> None:
    drawn = patient(address).complete("x warm", 8, (), temperature=0.7, seed=5)
    assert drawn.stopped
    with pytest.raises(ModelError, match="gave no answer"):
        patient(address).complete("x warm", 8, (), temperature=0.6)
