"""A run directory from claim to finish: resumable while unfinished, complete once it has its name.

Work goes on in `.NAME.unfinished` beside the final place. It carries the fingerprint of what was
asked, so that an interrupted job picks up its finished parts, and a different one never does. Where
nothing was finished, nothing is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Self

import yaml

from keepshot import __version__, records
from keepshot.assets import sha256_of
from keepshot.errors import OutputError, UserError, is_full_disk
from keepshot.models.reference import EMBEDDED, exists
from keepshot.records import InstructionRow, ItemResult, ResultDocument
from keepshot.report import write_report
from keepshot.specs import Spec, changes, read_yaml
from keepshot.tasks.catalog import CATALOG, SUITES, is_file
from keepshot.tasks.source import SUFFIXES

FINISHED_PARTS = ("*.parquet", "tuning.json", "keepshot.json", "complete")
"""Files whose presence means that there is something to go on from."""
SPEC_FILE = "spec.yaml"
INPUTS_FILE = "inputs.json"
"""sha256 of the examples that the spec names, and of models, while the work is unfinished."""
RECORDED_PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "scipy")


def free_name(parent: Path, name: str, record: str = "results.json") -> Path:
    """Return `parent/name`, or `parent/name-2` and so on where a finished run has that name.

    Args:
        parent: directory of runs.
        name: the first name tried.
        record: the file whose presence means that a run is finished.
    """
    candidate = parent / name
    number = 1
    while (candidate / record).exists():
        number += 1
        candidate = parent / f"{name}-{number}"
    return candidate


class Workspace:
    """The unfinished directory of one job; leaving its block with an error tidies it up."""

    def __init__(self, out_dir: Path, spec: Spec, *, overwrite: bool = False) -> None:
        """Claim `out_dir`, resuming unfinished work of the same spec.

        Raises:
            OutputError: if `out_dir` holds something, cannot be written, or unfinished work of
                another spec lies beside it, unless `overwrite`; or if it holds what is read.
        """
        self.out_dir = out_dir.absolute()
        records.claim(self.out_dir, overwrite=overwrite)
        _check_keeps(self.out_dir, spec)
        self.path = self.out_dir.parent / f".{self.out_dir.name}.unfinished"
        self._spec = spec
        self._made = [parent for parent in self.path.parents if not parent.exists()]
        self._mark = self.path / "fingerprint"
        self._wanted = f"{type(spec).__name__} {spec.fingerprint()} keepshot {__version__}"
        self._inputs = {str(path): sha256_of(path) for path in sorted(example_files(spec))}
        self._overwrite = overwrite
        self._check_ours()

    def begin(self, models: Mapping[str, str] | None = None) -> None:
        """Make the unfinished directory, once nothing is left to check; keep finished parts.

        Args:
            models: sha256 of what is measured, by reference: parts of another are not gone on from.

        Raises:
            OutputError: if the parts that lie there are of other models, unless `overwrite`.
        """
        self._inputs |= models or {}
        self._check_ours()
        if self.path.exists() and not self._is_ours():
            shutil.rmtree(self.path)
        text = yaml.safe_dump(
            self._spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True
        )
        records.write_text(text, self.path / SPEC_FILE)
        records.write_text(json.dumps(self._inputs), self.path / INPUTS_FILE)
        records.write_text(self._wanted, self._mark)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            return
        if not any(any(self.path.rglob(pattern)) for pattern in FINISHED_PARTS):
            shutil.rmtree(self.path, ignore_errors=True)
            for parent in self._made:
                with contextlib.suppress(OSError):  # something else lies there by now
                    parent.rmdir()
        if is_full_disk(error) and not isinstance(error, UserError):
            raise OutputError(
                f"{self.out_dir}: the disk is full; free some space and start again, which goes on "
                "from what is finished, or choose another --out"
            ) from error

    def _check_ours(self) -> None:
        if self._mark.exists() and not self._overwrite and not self._is_ours():
            found = "; ".join(self._differences())
            raise OutputError(
                f"{self.out_dir}: unfinished work of other settings lies in {self.path}"
                f"{f':{chr(10)}{found}' if found else ''};\n"
                "add --overwrite to discard it, or name another with --out"
            )

    def _is_ours(self) -> bool:
        same = self._mark.exists() and self._mark.read_text("utf-8") == self._wanted
        return same and not self._changed_files()

    def _changed_files(self) -> list[str]:
        """Return the files of examples, and models, that are not what they were at the start."""
        stored = self.path / INPUTS_FILE
        if not stored.is_file():
            return []
        before: dict[str, str] = json.loads(stored.read_text("utf-8"))
        return [
            name for name, found in self._inputs.items() if before.get(name, found) != found
        ]  # fmt: skip

    def _differences(self) -> list[str]:
        """Word what is not as it was: settings, files of examples, the version."""
        stored = self.path / SPEC_FILE
        before = read_yaml(stored) if stored.is_file() else {}
        now: dict[str, object] = self._spec.model_dump(mode="json")
        told = changes(before, now, self._spec.no_effect_on_results) if before else []
        told += [f"{name} has changed" for name in self._changed_files()]
        mark = self._mark.read_text("utf-8")
        if not mark.endswith(f" {__version__}"):
            told.append(f"it is of {mark.partition(' keepshot ')[2] or 'another version'}")
        return told

    def part(self, *names: str) -> Path:
        """Return a path for an intermediate result, which is deleted when the job finishes."""
        path = self.path.joinpath("parts", *names)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finish(
        self,
        document: ResultDocument,
        items: Sequence[ItemResult],
        followed: Sequence[InstructionRow] = (),
    ) -> ResultDocument:
        """Write records and report, drop the parts and give the directory its name."""
        records.write_items(items, self.path / "items.parquet")
        if followed:
            records.write_instructions(followed, self.path / "instructions.parquet")
        records.write_text(
            json.dumps(environment(), indent=1, ensure_ascii=False),
            self.path / "environment.json",
        )
        records.write_text(document.to_json(), self.path / "results.json")
        write_report(self.path)
        shutil.rmtree(self.path / "parts", ignore_errors=True)
        for passing in (self._mark, self.path / INPUTS_FILE):
            passing.unlink(missing_ok=True)
        if self.out_dir.exists():
            shutil.rmtree(self.out_dir)
        os.replace(self.path, self.out_dir)
        return document


def example_files(spec: Spec) -> set[Path]:
    """Return the files of examples that a spec names anywhere, lists in commas included."""
    return {Path(n) for n in _names(spec) if n.endswith(SUFFIXES) and is_file(n)}


def _names(spec: Spec) -> set[str]:
    """Return the texts in a spec, and the parts of lists in commas."""
    found: set[str] = set()

    def look(value: object) -> None:
        if isinstance(value, dict):
            for inner in value.values():
                look(inner)
        elif isinstance(value, list):
            for inner in value:
                look(inner)
        elif isinstance(value, str):
            found.update(name.strip() for name in (value, *value.split(",")))

    look(spec.model_dump(mode="json"))
    return found


def _check_keeps(out_dir: Path, spec: Spec) -> None:
    """Refuse to replace a directory with models, adapters or examples in it that the spec names.

    Names of tasks, suites and embedded models mean these, whatever lies in the directory.
    """
    place, names = out_dir.resolve(), _names(spec)
    names |= {part for name in names for part in name.split("+")}
    for path in map(Path, sorted(names - {"", *EMBEDDED, *CATALOG, *SUITES})):
        if exists(path) and path.expanduser().resolve().is_relative_to(place):
            raise OutputError(
                f"{out_dir}: holds {path}, which is read, and would be replaced; choose another "
                "--out"
            )


def environment() -> dict[str, object]:
    """Return versions, processor count and git commit of this run."""
    return {
        "keepshot": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
        "packages": {name: _version(name) for name in RECORDED_PACKAGES},
        "git_commit": _git_commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of the checkout that this package runs from, if it is one."""
    source = Path(__file__).parent
    try:
        answer = subprocess.run(
            ["git", "-C", str(source), "rev-parse", "HEAD"],
            capture_output=True, text=True, timeout=5, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
