"""Studies on Ray: on a cluster of their own and at an address, while workers are killed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_study_job import STUDY, sorted_frame, workplace, write_study

from command import status

__all__ = ["workplace"]
UNITS = 6 + 2 * (2 + 6)
"""6 tunings; 2 bases and 6 tuned models, each asked twice."""


def kill_workers(process: subprocess.Popen[str], claims: Path, times: int, seed: int) -> int:
    """Kill that many workers, each at a random point of the unit that it is at, or the next."""
    random_ = random.Random(seed)
    killed = set[int]()
    while process.poll() is None and len(killed) < times:
        fresh = [pid for pid in holders(claims) if pid not in killed]
        if not fresh:
            time.sleep(0.01)
            continue
        # At a unit, or while a process of its own is started for one that was lost.
        time.sleep(random_.choice((0.3, 1.5, 8.0)) * random_.random())
        pid = random_.choice(fresh)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it has just ended
        killed.add(pid)
    return len(killed)


def holders(claims: Path) -> list[int]:
    """The processes that hold a claim, dead ones included."""
    found: list[int] = []
    for path in sorted(claims.glob("[a-z]*")) if claims.exists() else ():
        with contextlib.suppress(OSError, ValueError):  # it is gone, or being written
            found.append(int(json.loads(path.read_text("utf-8"))["pid"]))
    return found


def begin(engine: str, out: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "keepshot", "study", "study.yaml", "--out", out, "--json"]
    arguments = ["--engine", engine, "--workers", "2"]
    return subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    return json.loads(out)


@pytest.mark.slow
def test_workers_killed_ten_times_lose_and_repeat_nothing(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(workplace, blends=None)
    assert status("study", "study.yaml", "--out", "whole", "--json") == 0
    capsys.readouterr()
    process = begin("ray", "apart")
    assert kill_workers(process, workplace / "apart" / "claims", 10, seed=5) == 10
    document = finished(process)
    assert (document["done"], document["failed"]) == (UNITS, 0)
    assert len(list((workplace / "apart" / "units").glob("*.json"))) == UNITS
    whole, apart = sorted_frame(workplace / "whole"), sorted_frame(workplace / "apart")
    assert not apart.duplicated(["unit", "task", "shots", "seed", "item"]).any()
    pd.testing.assert_frame_equal(whole, apart)


@pytest.fixture
def address() -> Generator[str]:
    """A Ray cluster that was started by somebody else."""
    utils = pytest.importorskip("ray.cluster_utils")
    head = {"num_cpus": 2, "include_dashboard": False}
    cluster = utils.Cluster(initialize_head=True, connect=False, head_node_args=head)
    try:
        yield cluster.address
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_a_cluster_at_an_address_runs_the_study_and_outlives_it(
    workplace: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one worker lost; the cluster is there for the next study."""
    write_study(workplace, seeds=[0], blends=None)
    assert status("study", "study.yaml", "--out", "whole", "--json") == 0
    capsys.readouterr()
    process = begin(address, "there")
    assert kill_workers(process, workplace / "there" / "claims", 1, seed=2) == 1
    assert finished(process)["failed"] == 0
    whole, there = sorted_frame(workplace / "whole"), sorted_frame(workplace / "there")
    pd.testing.assert_frame_equal(whole, there)
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=5).close()


def test_what_listens_and_is_no_cluster_is_said_soon(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray itself would wait for minutes."""
    small = {"recipes": {}, "targets": [], "blends": None, "exclude": [], "models": ["base"]}
    asks = {"a": {"tasks": STUDY["asks"]["few-shot"]["tasks"], "limit": 2}}
    write_study(workplace, **small, asks=asks)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        began = time.monotonic()
        assert status("study", "study.yaml", "--engine", f"127.0.0.1:{deaf.getsockname()[1]}") == 2
        assert time.monotonic() - began < 30
    assert "no Ray cluster at '127.0.0.1:" in capsys.readouterr().err
