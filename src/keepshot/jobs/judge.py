"""Compare two models' answers with one judge or more, or put verifiable instructions to a model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from keepshot import records
from keepshot.assets import AssetStore
from keepshot.errors import ConfigError, TaskError
from keepshot.jobs.loading import load_as
from keepshot.jobs.specs import JudgeSpec
from keepshot.judging.answers import answer_prompts, style_of
from keepshot.judging.follow import Examiner, instruction_scores, load_set
from keepshot.judging.judges import LikelihoodJudge
from keepshot.judging.outputs import (
    Comparison,
    Outputs,
    pair_up,
    read_outputs,
    read_preferences,
    write_outputs,
)
from keepshot.judging.pairwise import (
    LEAST_PASSING,
    Judge,
    Judgement,
    agreement,
    compare,
    from_preferences,
    sanity_comparisons,
    win_rate,
)
from keepshot.judging.policy import Following
from keepshot.judging.server import Server, ServerJudge
from keepshot.models.loading import LanguageModel
from keepshot.progress import Progress
from keepshot.records import JudgeDocument, WinRate
from keepshot.tasks.instruction_templates import EMBEDDED_SET
from keepshot.tasks.source import read_objects

FILE_SUFFIXES = (".json", ".jsonl")


def judge(
    spec: JudgeSpec,
    store: AssetStore,
    out_dir: Path | None,
    progress: Progress,
    *,
    key: str | None = None,
) -> JudgeDocument:
    """Do what `spec` asks, and write answers, judgements and results to `out_dir` if given.

    A server's answers are kept in `out_dir/journal-N.jsonl` as they come: the same command with the
    same directory goes on after a stop.

    Args:
        spec: what is judged, and by whom.
        store: where assets are cached.
        out_dir: where to write; None writes nothing.
        progress: told of stages.
        key: bearer token for servers.
    """
    job = _Judging(spec, store, out_dir, progress, key)
    document = job.follow(spec.ifeval) if spec.ifeval else job.compare()
    if out_dir is not None:
        records.write_text(
            document.model_dump_json(by_alias=True, indent=1), out_dir / "judge.json"
        )
    return document


class _Judging:
    """What is asked, and the models loaded so far."""

    def __init__(
        self,
        spec: JudgeSpec,
        store: AssetStore,
        out_dir: Path | None,
        progress: Progress,
        key: str | None,
    ) -> None:
        self.spec, self.store, self.out_dir = spec, store, out_dir
        self.progress, self.key = progress, key
        self.answers = spec.answers
        if not spec.answers.seed:
            self.answers = spec.answers.model_copy(update={"seed": spec.seed})
        self.policy: dict[str, object] = {}

    def follow(self, reference: str) -> JudgeDocument:
        """Put verifiable instructions to one model."""
        spec = self.spec
        following = Following(prompts=spec.prompts, variant=spec.variant)
        examiner = Examiner(load_set(spec.prompts), self.answers, following.judged, self.store)
        model = self._load(reference)
        self.progress.stage(f"{reference}: instructions")
        rows = examiner.examine(
            model, arm=reference, limit=spec.limit, progress=self.progress.update
        )
        if self.out_dir is not None:
            records.write_instructions(rows, self.out_dir / "instructions.parquet")
        return JudgeDocument(
            instructions=instruction_scores(rows), policy=self.answers.model_dump(mode="json")
        )

    def compare(self) -> JudgeDocument:
        """Compare candidate and reference with every judge."""
        assert self.spec.candidate is not None
        assert self.spec.reference is not None
        candidate = self._outputs(self.spec.candidate, "candidate")
        reference = self._outputs(self.spec.reference, "reference")
        comparisons = pair_up(candidate, reference)[: self.spec.limit]
        names = candidate.generator, reference.generator
        rates: list[WinRate] = []
        sanity: list[WinRate] = []
        notes: list[str] = []
        judged: list[tuple[str, list[Judgement]]] = []
        for number, text in enumerate(self.spec.judges):
            if _is_file(text):
                identity, preferences = read_preferences(Path(text), comparisons)
                notes.append(f"{identity}: a file of judgements cannot be asked, and is not tested")
                judgements = from_preferences(comparisons, preferences)
                asked = identity, ""
            else:
                whom = self._judge(text, number)
                self.progress.stage(f"judging by {text}")
                judgements = compare(whom, comparisons)
                asked = whom.identity, whom.prompt_hash
                sanity += self._test(whom, reference, notes) if self.spec.sanity else []
            self._write(judgements, names, asked, number)
            rates.append(win_rate(judgements, names, asked))
            judged.append((asked[0], judgements))
        pairs = itertools.combinations(judged, 2)
        found = [agreement(a, b, (first, second)) for (first, a), (second, b) in pairs]
        notes += [
            f"agreement of {a.judges[0]} and {a.judges[1]}: same side {a.same_side:.0%} of "
            f"{a.num_items}, kappa {a.kappa:.2f}"
            for a in found
        ]
        return JudgeDocument(
            win_rates=rates, sanity=sanity, agreement=found, policy=self.policy, notes=notes
        )

    def _test(self, whom: Judge, outputs: Outputs, notes: list[str]) -> list[WinRate]:
        """Compare answers with themselves and with their shuffled words; say how it went."""
        self.progress.stage(f"testing {whom.identity}")
        rates: list[WinRate] = []
        for name, comparisons in sanity_comparisons(outputs).items():
            if not comparisons:
                notes.append(f"{whom.identity}: no answer has eight words, so it is not tested")
                return []
            judgements = compare(whom, comparisons[: self.spec.limit])
            title = f"answers against {'their words ' if name == 'shuffled' else ''}{name}"
            names = title, outputs.generator
            try:
                rate = win_rate(judgements, names, (whom.identity, whom.prompt_hash))
            except TaskError as error:
                notes.append(f"not tested: {error}")
                return rates
            rates.append(rate)
            low, high = rate.win_rate_ci95
            notes.append(
                f"{rate.judge}: {title}, {rate.discrete_win_rate:.1f} % of "
                f"{rate.num_comparisons} won, mean preference {rate.win_rate:.1f} % "
                f"[{low:.1f}, {high:.1f}]"
            )
        if rates[-1].discrete_win_rate < LEAST_PASSING:
            notes.append(
                f"{whom.identity} does not tell an answer from its shuffled words (below "
                f"{LEAST_PASSING:.0f} %): what it says of models means nothing"
            )
        return rates

    def _judge(self, text: str, number: int) -> Judge:
        name, at, url = text.partition("@http")
        if not at:
            return LikelihoodJudge(self._load(text), progress=self.progress.update)
        spec = self.spec
        server = Server(
            url=f"http{url}", model=name, key=self.key, timeout=spec.timeout, tries=spec.tries,
            first_wait=spec.first_wait, workers=spec.workers,
        )  # fmt: skip
        journal = self.out_dir / f"journal-{number}.jsonl" if self.out_dir else None
        return ServerJudge(server, journal=journal, progress=self.progress.update)

    def _outputs(self, text: str, role: str) -> Outputs:
        if _is_file(text):
            return read_outputs(Path(text))
        prompts = _read_prompts(self.spec.prompts)[: self.spec.limit]
        model = self._load(text)
        self.progress.stage(f"{text}: answering")
        policy = self.answers
        answers = answer_prompts(model, prompts, policy, progress=self.progress.update)
        self.policy[role] = {
            **policy.model_dump(mode="json"),
            "style": style_of(model, policy),
            "truncated": sum(answer.truncated for answer in answers),
        }
        outputs = Outputs(text, {answer.prompt: answer.text for answer in answers})
        if self.out_dir is not None:
            write_outputs(outputs, self.out_dir / f"{role}.json")
        return outputs

    def _load(self, reference: str) -> LanguageModel:
        self.progress.stage(f"loading {reference}")
        return load_as(self.spec, reference, self.store)

    def _write(
        self,
        judgements: Sequence[Judgement],
        names: tuple[str, str],
        asked: tuple[str, str],
        number: int,
    ) -> None:
        """Write judgements as AlpacaEval's annotations, with what else is known of each."""
        if self.out_dir is None:
            return
        rows: list[dict[str, object]] = []
        for judgement in judgements:
            content = asdict(judgement)
            comparison: Comparison = judgement.comparison
            del content["comparison"], content["preference"]
            rows.append(
                {
                    "instruction": comparison.instruction,
                    "output_1": comparison.reference,
                    "output_2": comparison.candidate,
                    "generator_1": names[1],
                    "generator_2": names[0],
                    "annotator": asked[0],
                    "prompt_hash": asked[1],
                    "preference": None
                    if judgement.preference is None
                    else 1.0 + judgement.preference,
                    **content,
                }
            )
        text = json.dumps(rows, indent=1, ensure_ascii=False)
        records.write_text(text + "\n", self.out_dir / f"annotations-{number}.json")


def _read_prompts(source: str) -> list[str]:
    if source == EMBEDDED_SET:
        return [prompt.prompt for prompt in load_set(source).prompts]
    prompts: list[str] = []
    for row, where in read_objects(Path(source)):
        text = row.get("instruction", row.get("prompt"))
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"{where}: needs the text 'instruction' or 'prompt'")
        prompts.append(text)
    return list(dict.fromkeys(prompts))


def _is_file(text: str) -> bool:
    return text.endswith(FILE_SUFFIXES)
