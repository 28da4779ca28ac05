"""One run of a study on disk: what of it is done, and what the next process has to do.

FOLDER/STUDY/PEER/seed_1/   config.yaml      what it trains, resolved
                            console.log, evaluation.log
                            sessions.jsonl   a line for each process that trained it
                            metrics.jsonl, checkpoints/, summary.json ... of launch/pretrain.py
                            evaluation/STEP/ of tools/evaluate.py
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from maha_megatron.checkpoint.layout import replace_text, step_name
from maha_megatron.config.load import config_to_dict, dump_yaml, load_config
from maha_megatron.config.schema import Config
from maha_megatron.config.study import Evaluation, Study
from maha_megatron.errors import ConfigError
from maha_megatron.train.metrics import METRICS, read_rows
from maha_megatron.train.report import SUMMARY
from maha_megatron.train.trials import CONSOLE_LOG, column

CONFIG, SESSIONS, EVALUATION_LOG = "config.yaml", "sessions.jsonl", "evaluation.log"


class Stage(Enum):
    """What a run lacks."""

    TRAIN = "training"
    EVALUATE = "evaluating"
    DONE = "done"


@dataclass(frozen=True, kw_only=True)
class Session:
    """A process that trained a run: its seconds, its exit code, and how many others shared its device, on average."""

    seconds: float
    beside: float
    code: int


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """A peer trained from a seed."""

    peer: str
    seed: int
    config: Config
    evaluation: Evaluation

    @property
    def title(self) -> str:
        return f"{self.peer} seed {self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.config.run.folder)

    @property
    def step_tokens(self) -> int:
        return self.config.train.global_batch_samples * self.config.data.sequence_tokens

    @property
    def stage(self) -> Stage:
        """What it lacks now."""
        if not self.is_trained:
            return Stage.TRAIN
        return Stage.DONE if self.evaluation.is_empty or self.found() else Stage.EVALUATE

    @property
    def is_trained(self) -> bool:
        """Whether the trainer said that it is finished."""
        done = _json(self.folder / SUMMARY)
        return done is not None and done["steps"] >= self.config.train.steps

    def rows(self) -> list[dict[str, float]]:
        """Its metrics so far."""
        return read_rows(self.folder / METRICS)

    def steps_done(self) -> int:
        """Steps that are in its metrics."""
        return max((int(row["step"]) for row in self.rows()), default=0)

    def sessions(self) -> list[Session]:
        """Of the processes that have ended."""
        return [Session(**row) for row in read_rows(self.folder / SESSIONS)]

    def validation_loss(self) -> float:
        """Nats a token at the end; of a trained run."""
        return column(self.rows(), "validation_loss_nats")[self.config.train.steps]

    def found(self) -> dict[str, Any] | None:
        """The newest evaluation that was asked for as the study asks for it now; None if there is none."""
        folder = self.folder / "evaluation" / step_name(self.config.train.steps)
        for path in sorted(folder.glob("evaluate_*.json"), key=lambda path: path.stat().st_mtime, reverse=True):
            record = _json(path)
            # behind `python evaluate.py --run FOLDER`, which may be spelled otherwise: nothing more, nothing else
            if record is not None and shlex.split(record["command"])[4:] == self._asked():
                return record
        return None

    # ------------------------------------------------------------------------------------------------- what to start

    def prepare(self) -> None:
        """Make its folder and write its configuration, or see that what lies there is this run.

        Raises:
            ConfigError: the folder holds another run, or something else.
        """
        path = self.folder / CONFIG
        if path.is_file():
            kept, wanted = (_flat(config_to_dict(config)) for config in (load_config(path), self.config))
            differ = [f"{key} was {kept[key]}, is {wanted[key]}" for key in wanted if kept[key] != wanted[key]]
            if differ:
                raise ConfigError(
                    f"{self.folder} holds a run of {self.title} with other settings ({'; '.join(differ)}): give the "
                    "old ones to continue it, or another --folder"
                )
            return
        if self.folder.exists() and any(self.folder.iterdir()):
            raise ConfigError(f"{self.folder} exists and is no run of a study: move it, or choose another --folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(path, dump_yaml(self.config))

    def log_of(self, stage: Stage) -> Path:
        """Where a process of a stage prints to."""
        return self.folder / (CONSOLE_LOG if stage is Stage.TRAIN else EVALUATION_LOG)

    def words(self, stage: Stage, pretrain: Path, evaluate: Path) -> list[str]:
        """What follows `python` on the command line of a stage, from the paths of the two programs."""
        if stage is Stage.TRAIN:
            return [str(pretrain), "--config", str(self.folder / CONFIG)]
        return [str(evaluate), "--run", str(self.folder), *self._asked()]

    def _asked(self) -> list[str]:
        """Options of tools/evaluate.py."""
        asked, words = self.evaluation, ["--checkpoint", str(self.config.train.steps)]
        for name in ("samples", "needles", "queries"):
            words += [f"--{name}", str(getattr(asked, name))]
        if asked.distances and asked.needles:
            words += ["--distances", *map(str, asked.distances)]
        if asked.pairs and asked.queries:
            words += ["--pairs", str(asked.pairs)]
        return words

    def add_session(self, session: Session) -> None:
        """Note a process that has ended."""
        with open(self.folder / SESSIONS, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(session)) + "\n")


def study_runs(
    study: Study,
    *,
    peers: Sequence[str],
    seeds: Sequence[int],
    overrides: Sequence[str],
    folder: Path,
    data: str,
    tokenizer: str,
) -> list[StudyRun]:
    """The runs of some peers and seeds, in the order in which they are made: every peer of the first seed first.

    Raises:
        ConfigError: one of them cannot be made as it is written.
    """

    def run(peer: str, seed: int) -> StudyRun:
        place = folder / study.name / peer / f"seed_{seed}"
        config = study.config(peer, seed, overrides=overrides, folder=place, data=data, tokenizer=tokenizer)
        return StudyRun(peer=peer, seed=seed, config=config, evaluation=study.evaluation)

    return [run(peer, seed) for seed in seeds for peer in peers]


def _json(path: Path) -> dict[str, Any] | None:
    """What a JSON file holds; None if it is not there, or was never written to its end."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _flat(tree: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}
