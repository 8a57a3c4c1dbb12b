"""Win rates: both orders, every comparison accounted for, files, servers, and length control."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from command import status
from keepshot.errors import ServerError, TaskError
from keepshot.judging.judges import MOST_CHARACTERS, LikelihoodJudge, question, read_label
from keepshot.judging.length_control import Gamed, control_length, shrunken_win_rate
from keepshot.judging.outputs import (
    Comparison,
    Outputs,
    pair_up,
    read_outputs,
    read_preferences,
    write_outputs,
)
from keepshot.judging.pairwise import (
    Judgement,
    Opinion,
    Pair,
    agreement,
    compare,
    from_preferences,
    sanity_comparisons,
    win_rate,
)
from keepshot.judging.server import Server, ServerJudge
from keepshot.models.loading import LanguageModel
from keepshot.scoring.engine import Engine
from keepshot.scoring.request import LogLikelihood, LogLikelihoodResult

NAMES = ("ours", "theirs")
ASKED = ("a judge", "0" * 16)


class Biased:
    """Prefers the longer answer with 0.8, and whatever comes first by 0.1."""

    identity = "biased"
    prompt_hash = ""

    def judge(self, pairs: Sequence[Pair]) -> list[Opinion]:
        return [self._one(pair) for pair in pairs]

    def _one(self, pair: Pair) -> Opinion:
        if "unreadable" in pair.first + pair.second:
            return Opinion(None, "no verdict")
        if len(pair.first) == len(pair.second):
            return Opinion(0.6)
        return Opinion(0.9 if len(pair.first) > len(pair.second) else 0.3)


def test_both_orders_cancel_a_preference_for_a_place() -> None:
    comparisons = [
        Comparison("1", "longer", "short"),
        Comparison("2", "same", "even"),
        Comparison("3", "short", "longer"),
        Comparison("4", "longer", "short"),
        Comparison("5", "x", "unreadable"),
        Comparison("6", "", "something"),
    ]
    judgements = compare(Biased(), comparisons)
    assert [j.preference for j in judgements] == pytest.approx([0.8, 0.5, 0.2, 0.8, None, 0.0])
    assert [j.status for j in judgements] == [
        "judged", "tied", "judged", "judged", "failed", "judged",
    ]  # fmt: skip
    rate = win_rate(judgements, NAMES, ASKED)
    assert rate.win_rate == pytest.approx(100 * (0.8 + 0.5 + 0.2 + 0.8 + 0.0) / 5)
    assert rate.position_bias == pytest.approx(10.0)
    assert rate.discrete_win_rate == pytest.approx(100 * (1 + 0.5 + 0 + 1 + 0) / 5)
    counted = rate.num_judged + rate.num_tied + rate.num_failed
    assert (counted, rate.num_comparisons) == (6, 6)
    assert rate.failures == {"no verdict": 1}
    assert rate.length_controlled_win_rate is None  # too few to fit anything to


def test_a_judge_that_mostly_fails_is_an_error() -> None:
    failed = [Judgement(Comparison(str(i), "a", "b"), None, None, None, "failed", "mute")
              for i in range(3)]  # fmt: skip
    fine = compare(Biased(), [Comparison(str(i), "ab", "b") for i in range(9)])
    with pytest.raises(TaskError, match=r"no verdict on 3 of 12 comparisons .*3 times: mute"):
        win_rate([*failed, *fine], NAMES, ASKED)
    assert win_rate([*failed[:2], *fine], NAMES, ASKED).num_failed == 2


def test_files_are_read_and_written_as_alpaca_eval_has_them(tmp_path: Path) -> None:
    outputs = Outputs("ours", {"Say hi": "Hi\u00e9", "Count": "1 2"})
    write_outputs(outputs, tmp_path / "outputs.json")
    assert read_outputs(tmp_path / "outputs.json") == outputs
    rows = json.loads((tmp_path / "outputs.json").read_text("utf-8"))
    assert rows[0] == {"instruction": "Say hi", "output": "Hi\u00e9", "generator": "ours"}
    twice = tmp_path / "twice.json"
    twice.write_text(json.dumps([rows[0], rows[0]]), "utf-8")
    with pytest.raises(TaskError, match=r"twice.json row 2: instruction 'Say hi' is there twice"):
        read_outputs(twice)
    mixed = tmp_path / "mixed.json"
    mixed.write_text(json.dumps([rows[0], rows[1] | {"generator": "x"}]), "utf-8")
    with pytest.raises(TaskError, match="one generator, found ours, x"):
        read_outputs(mixed)
    with pytest.raises(TaskError, match=r"1 of 2 instructions of 'ours' are not among .* 'Count'"):
        pair_up(outputs, Outputs("theirs", {"Say hi": "Ho"}))


def test_a_file_of_judgements_is_a_judge(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"instruction": "1", "preference": 2, "annotator": "gold"},
        {"instruction": "2", "preference": 1.25, "annotator": "gold"},
        {"instruction": "3", "preference": 0, "annotator": "gold"},
        {"instruction": "4", "preference": None, "annotator": "gold"},
        {"instruction": "5", "preference": 1, "annotator": "gold"},
        {"instruction": "6", "preference": 1.5, "annotator": "gold"},
    ]
    path = tmp_path / "gold.json"
    path.write_text(json.dumps(rows), "utf-8")
    comparisons = [Comparison(str(i), "a", "b") for i in range(1, 7)]
    name, found = read_preferences(path, comparisons)
    judgements = from_preferences(comparisons, found)
    assert name == "gold"
    assert [j.preference for j in judgements] == [1.0, 0.25, 0.5, None, 0.0, 0.5]
    rate = win_rate(judgements, NAMES, (name, ""))
    # By hand: (1 + .25 + .5 + 0 + .5) / 5, and with sides alone (1 + 0 + .5 + 0 + .5) / 5.
    assert rate.win_rate == pytest.approx(45.0)
    assert rate.discrete_win_rate == pytest.approx(40.0)
    assert rate.failures == {"judgement is null": 1}
    path.write_text(json.dumps([{"instruction": "1", "preference": 3}]), "utf-8")
    with pytest.raises(TaskError, match="row 1: 'preference' is 3"):
        read_preferences(path, comparisons)
    path.write_text(json.dumps([rows[0], rows[1], rows[0]]), "utf-8")
    with pytest.raises(TaskError, match="row 3: instruction '1' is there twice"):
        read_preferences(path, comparisons)


def test_judgements_are_of_the_answers_that_are_compared(tmp_path: Path) -> None:
    """They were joined by instruction alone, and so were any model's, on either side."""
    path = tmp_path / "gold.json"
    rows = [
        {"instruction": "1", "output_1": "b", "output_2": "a", "preference": 2},
        {"instruction": "2", "output_1": "b", "output_2": "a", "preference": 1.25},
        {"instruction": "3", "output_1": "b", "output_2": "a", "preference": None},
        {"instruction": "4", "preference": 1},
        {"instruction": "not compared", "output_1": "x", "output_2": "y", "preference": 1},
    ]
    path.write_text(json.dumps(rows), "utf-8")

    def preferences(candidate: str, reference: str) -> list[float | None]:
        comparisons = [Comparison(str(i), candidate, reference) for i in range(1, 5)]
        found = read_preferences(path, comparisons)[1]
        return [j.preference for j in from_preferences(comparisons, found)]

    assert preferences("a", "b") == [1.0, 0.25, None, 0.0]
    assert preferences("b", "a") == [0.0, 0.75, None, 0.0]
    for candidate, reference in (("z", "b"), ("a", "z"), ("a", "a")):
        with pytest.raises(TaskError, match=r"gold.json row 1: judges other answers to '1'"):
            preferences(candidate, reference)


def test_agreement_of_two_judges() -> None:
    comparisons = [Comparison(str(i), "a", "b") for i in range(8)]
    first = from_preferences(comparisons, dict(zip("01234567", [2.0] * 4 + [1.0] * 4, strict=True)))
    second = from_preferences(
        comparisons, dict(zip("01234567", [2.0, 2.0, 2.0, 1.0] * 2, strict=True))
    )
    found = agreement(first, second, ("x", "y"))
    assert (found.num_items, found.same_side) == (8, 0.5)
    # By hand: expected agreement .5 * .75 + .5 * .25 = .5, so kappa = 0.
    assert found.kappa == pytest.approx(0.0)
    assert agreement(first, first, ("x", "x")).kappa == 1.0
    with pytest.raises(TaskError, match="0 comparisons in common"):
        agreement(first, [], ("x", "y"))


def test_the_sanity_set_has_known_outcomes() -> None:
    text = "one two three four five six seven eight nine ten"
    found = sanity_comparisons(Outputs("r", {"a": text, "b": "too short"}))
    assert found["itself"] == [Comparison("a", text, text)]
    (shuffled,) = found["shuffled"]
    assert shuffled.candidate == text
    assert sorted(shuffled.reference.split()) == sorted(text.split())
    assert shuffled.reference != text


def test_a_verdict_is_a_label_that_stands_alone() -> None:
    assert read_label("A").first == 1.0
    assert read_label("Answer B is better than A").first == 0.0
    assert read_label("**B**").first == 0.0
    assert read_label("Apples, surely").first is None
    assert read_label(" ").reason == "empty answer"
    shown = question(Pair("Use {first}", "x" * 9000, "{second}"))
    assert "Use {first}" in shown
    assert shown.count("x") < MOST_CHARACTERS + 20
    assert "{second}" in shown


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_local_model_judges_by_its_labels(
    pico_models: dict[str, LanguageModel], family: str
) -> None:
    model = pico_models[family]
    judge = LikelihoodJudge(model)
    pairs = [Pair("Say hi", "Hi", "Ho"), Pair("Say hi", "Ho", "Hi"), Pair("x", "y" * 3000, "z")]
    first, second, long = judge.judge(pairs)
    assert long.first is None
    assert long.reason == "longer than the judge's context"
    context, label = model.encode_pair(question(pairs[0]) + "\n\nThe better answer is", " A")
    other = model.encode_pair(question(pairs[0]) + "\n\nThe better answer is", " B")[1]
    one, two = Engine(model, share=False).run(
        [LogLikelihood(tuple(context), tuple(t)) for t in (label, other)]
    )
    assert isinstance(one, LogLikelihoodResult)
    assert isinstance(two, LogLikelihoodResult)
    odds = np.exp(one.log_likelihood - two.log_likelihood)
    assert first.first == pytest.approx(odds / (1 + odds), abs=1e-4)
    assert first.first != second.first
    # An answer against itself is even, whatever the judge thinks of places.
    (even,) = compare(judge, [Comparison("Say hi", "Hi", "Hi")])
    assert even.status == "tied"


# -- a server in another process -----------------------------------------------------------------

SERVER = """
    import json, sys
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        seen = {}
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][0]["content"]
            tries = Handler.seen[text] = Handler.seen.get(text, 0) + 1
            status, answer = 200, "A" if len(text.split("Answer A:")[1].split("Answer B:")[0]) > \\
                len(text.split("Answer B:")[1].split("Which answer")[0]) else "B"
            if self.headers["Authorization"] != "Bearer secret":
                status = 401
            elif "flaky" in text and tries < 3:
                status = 429 if tries == 1 else 503
            elif "down" in text:
                status = 500
            reply = {"choices": [{"message": {"content": answer}}]} if status == 200 else {"e": 1}
            content = json.dumps(reply).encode()
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", "0.5")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
"""


@contextmanager
def serving() -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SERVER)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving() as url:
        yield url


def test_a_server_is_asked_again_until_it_answers_and_never_twice(
    address: str, tmp_path: Path
) -> None:
    waits: list[float] = []
    server = Server(address, "tiny", key="secret", tries=8, first_wait=0.01, workers=2)
    journal = tmp_path / "journal.jsonl"
    judge = ServerJudge(server, journal=journal, sleep=waits.append)
    comparisons = [Comparison(f"flaky {i}", "a long answer" + " x" * i, "short") for i in range(5)]
    judgements = compare(judge, comparisons)
    assert [j.preference for j in judgements] == [1.0] * 5
    assert judge.num_asked == 10
    assert 0.5 in waits  # what Retry-After said
    assert 0.02 in waits  # the second wait, of our own
    assert "secret" not in journal.read_text("utf-8")
    # A run that was killed in the middle of a line goes on, and asks only for what is missing.
    lines = journal.read_text("utf-8").splitlines()
    journal.write_text("\n".join(lines[:7]) + "\n" + lines[7][:20], "utf-8")
    again = ServerJudge(server, journal=journal, sleep=waits.append)
    assert compare(again, comparisons) == judgements
    assert again.num_asked == 3


def test_the_command_goes_on_without_asking_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEEPSHOT_JUDGE_KEY", "secret")
    words = "one two three four five six seven eight"

    def write(prompts: Sequence[str]) -> None:
        for name, answer in (("ours", f"{words} nine"), ("theirs", words)):
            outputs = Outputs(name, dict.fromkeys(prompts, answer))
            write_outputs(outputs, tmp_path / f"{name}.json")

    with serving() as url:
        command = ["judge", "ours.json", "theirs.json", "--judge", f"m@{url}", "--out", "out",
                   "--set", "tries=2", "--set", "first_wait=0", "--set", "workers=1"]  # fmt: skip
        write(["a", "b", "down"])
        assert status(*command) == 2
        assert "no answer to a comparison after 2 tries: HTTP 500" in capsys.readouterr().err
        kept = (tmp_path / "out" / "journal-0.jsonl").read_text("utf-8").splitlines()
        assert 2 <= len(kept) < 6
        write(["a", "b", "c"])
        assert status(*command) == 0
        assert (tmp_path / "out" / "journal-0.jsonl").read_text("utf-8").splitlines()[:2] == kept[
            :2
        ]
    # Nobody is there any more: all that is said was said before.
    capsys.readouterr()
    assert status(*command, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    (rate,) = document["win_rates"]
    assert (rate["win_rate"], rate["num_judged"], rate["num_failed"]) == (100.0, 3, 0)
    assert rate["judge"] == f"m at {url}"
    # This judge goes by length alone, and shuffled words are as long: it is found out.
    assert document["sanity"][1]["discrete_win_rate"] == 50.0
    assert "does not tell an answer from its shuffled words" in "".join(document["notes"])
    assert "secret" not in "".join(p.read_text("utf-8") for p in (tmp_path / "out").iterdir())


def test_a_server_that_refuses_or_stays_down_is_named(address: str) -> None:
    pair = [Pair("x", "a", "b")]
    with pytest.raises(ServerError, match="refused a comparison: HTTP 401"):
        ServerJudge(Server(address, "tiny", key="wrong")).judge(pair)
    waits: list[float] = []
    down = ServerJudge(
        Server(address, "tiny", key="secret", tries=3, first_wait=1.0), sleep=waits.append
    )
    with pytest.raises(ServerError, match="no answer to a comparison after 3 tries: HTTP 500"):
        down.judge([Pair("down", "a", "b")])
    assert waits == [1.0, 2.0]
    nobody = ServerJudge(Server("http://127.0.0.1:9/v1", "m", tries=1), sleep=waits.append)
    with pytest.raises(ServerError, match="after 1 tries"):
        nobody.judge(pair)


# -- length control --------------------------------------------------------------------------------


def synthetic(seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Preferences that follow length and difficulty, and candidates that are longer."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(100, 2000, size=(400, 2)).astype(float)
    lengths[:, 0] *= 1.5
    difference = lengths[:, 0] - lengths[:, 1]
    difficulty = generator.normal(size=400)
    logits = -0.3 + np.tanh(difference / difference.std(ddof=1)) + 0.4 * difficulty
    return 1 / (1 + np.exp(-logits)), lengths, difficulty


def test_length_control_recovers_the_preference_at_equal_length() -> None:
    preferences, lengths, difficulty = synthetic(0)
    found = control_length(preferences, lengths, difficulty)
    assert found is not None
    # Without noise the three weights are those that made the data.
    assert found.weights == pytest.approx((-0.3, 1.0, 0.4), abs=1e-4)
    expected = float(np.mean(1 / (1 + np.exp(0.3 - 0.4 * difficulty))))
    assert found.win_rate.value == pytest.approx(expected, abs=1e-5)
    assert found.win_rate.value < preferences.mean() - 0.05
    assert control_length(preferences[:9], lengths[:9]) is None
    separated = (lengths[:, 0] > lengths[:, 1]).astype(float)
    assert control_length(separated, lengths) is None


def test_the_interval_of_a_length_controlled_win_rate_covers() -> None:
    """At equal length the true rate is 0.5: 95 % intervals of 200 samples hold it 93 to 97 %."""
    inside = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        lengths = generator.integers(100, 2000, size=(150, 2)).astype(float)
        difference = lengths[:, 0] - lengths[:, 1]
        chance = 1 / (1 + np.exp(-np.tanh(difference / difference.std(ddof=1))))
        found = control_length((generator.random(150) < chance).astype(float), lengths)
        assert found is not None
        inside += found.win_rate.low <= 0.5 <= found.win_rate.high
    assert 0.90 * 200 <= inside <= 0.99 * 200


def test_shrinking_is_weak_where_the_data_are_clear() -> None:
    preferences, lengths, difficulty = synthetic(1)
    plain = control_length(preferences, lengths, difficulty)
    assert plain is not None
    shrunken = shrunken_win_rate(preferences, lengths, difficulty)
    assert shrunken == pytest.approx(plain.win_rate.value, abs=1e-3)
    # Gamed rows that prefer the longer answer strongly leave less to the candidate itself.
    length = np.linspace(-2, 2, 400)
    gamed = Gamed((length > 0).astype(float), -length, difficulty)
    assert shrunken_win_rate(preferences, lengths, difficulty, gamed) != shrunken
