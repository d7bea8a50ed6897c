"""What a run of ``spa fit`` computes, as data."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optax
from jax.sharding import Mesh

from mlfs_jax.backbone.quantised import check_bits
from mlfs_jax.data.batches import BUCKETS
from mlfs_jax.data.encode import Encoded, load_task
from mlfs_jax.data.tasks import Task, get_task
from mlfs_jax.errors import ConfigError
from mlfs_jax.fit_config import from_anywhere
from mlfs_jax.hf.load import from_pretrained
from mlfs_jax.model import Model
from mlfs_jax.sharding import sharding_of
from mlfs_jax.stages import Stage
from spa_jax.gate_fit import GateConfig
from spa_jax.seam import Setting
from spa_jax.side import SideConfig

FIT, BASELINE = "spa fit", "spa baseline"
"""What a run folder says it is of."""
STARTS = ("sliced", "random")
TAPS = ("off", "ram", "disk")


@dataclass(frozen=True)
class FitConfig:
    """Everything that decides what a run computes; a run folder only ever continues with the same one.

    Attributes:
        model: a name of the catalogue, a hub id, a local Hugging Face directory, or a GGUF file.
        task: a language task's name, or a .jsonl file with prompt, completion and perhaps user.
        setting: spa, s1 (always f + g), s2 (the gate picks f or g) or s3 (g alone: LST).
        user: only this user's examples.
        seed: of new weights and of the order of the data.
        steps: optimizer steps of the side network; by default six epochs of its examples, and 600 at most: what few
            examples have to say is soon learnt by heart.
        learning_rate: the peak: linear warm-up, then cosine to 0.
        batch_size: examples in a step.
        side: shape of the side network.
        start: "sliced" out of the backbone by importance, "random", or the folder of a finished run over the same base,
            whose side network learns on; by default sliced for a ladder.
        importance_examples: training examples that the importance is measured on.
        gate: how the gate is trained and set.
        calibration_examples: of the validation split, that the threshold is chosen on.
        cache_taps: "ram" or "disk": the backbone runs once over each example, and an epoch costs the side network only.
        cache_gb: the most that cached taps may take.
        taps_folder: for "disk": where, to be kept for other runs on the same data; by default in the run's folder,
            until the run is finished.
        base_bits: 8 or 4: the frozen base's layers are kept in so many, with a scale for each 64 inputs; 32: as
            they are. A plugin is of the base that it was fitted to: serve that one with the same bits.
        max_length: tokens of prompt and completion; the default is the task's.
        buckets: lengths that batches are padded to (each is one more compile of the step).
        limit: at most this many examples of each split.
        save_every: steps between checkpoints.
    """

    model: str
    task: str
    setting: str = "spa"
    user: str | None = None
    seed: int = 0
    steps: int | None = None
    learning_rate: float = 2e-3
    batch_size: int = 16
    side: SideConfig = field(default_factory=SideConfig)
    start: str | None = None
    importance_examples: int = 64
    gate: GateConfig = field(default_factory=GateConfig)
    calibration_examples: int = 256
    cache_taps: str = "off"
    cache_gb: float = 8.0
    taps_folder: str | None = None
    base_bits: int = 32
    max_length: int | None = None
    buckets: tuple[int, ...] = BUCKETS
    limit: int | None = None
    save_every: int = 100

    def __post_init__(self):
        Setting.parse(self.setting)
        for name, least in (
            ("steps", 1),
            ("batch_size", 1),
            ("seed", 0),
            ("save_every", 1),
            ("importance_examples", 1),
            ("calibration_examples", 1),
        ):
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"{name} = {value}: expected at least {least}.")
        if self.start == "sliced" and self.side.ladder == "plugin":
            raise ConfigError("start = 'sliced' of a plugin, which has no blocks like the backbone's: give 'random'.")
        if self.cache_taps not in TAPS:
            raise ConfigError(f"cache_taps = {self.cache_taps!r}: expected one of {', '.join(TAPS)}.")
        if self.taps_folder is not None and self.cache_taps != "disk":
            raise ConfigError(f"taps_folder = {self.taps_folder!r} needs cache_taps = 'disk', got {self.cache_taps!r}.")
        if not self.cache_gb > 0:
            raise ConfigError(f"cache_gb = {self.cache_gb}: expected gigabytes, more than 0.")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate = {self.learning_rate}: expected a positive, finite number.")
        check_bits(self.base_bits)
        if self.user is not None and not self.user.strip():
            raise ConfigError("user is empty: name the user whose examples the plugin is made of, or leave user out.")

    def to_json(self) -> dict[str, Any]:
        """For run.json, see :func:`saved_fields`."""
        return saved_fields(self)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        return Stage("side", "maxnet", self.steps, self.learning_rate).optimizer()

    def for_examples(self, count: int) -> FitConfig:
        """The same with the steps that so many training examples are worth, where none were asked for."""
        return dataclasses.replace(self, steps=self.steps or min(600, max(20, 6 * count // self.batch_size)))

    @property
    def sliced(self) -> bool:
        return (self.start or "sliced") == "sliced" and self.side.ladder == "ladder"

    def anywhere(self) -> FitConfig:
        """The same with local paths in full, so that the run folder opens from anywhere."""
        absolute = lambda path: str(Path(path).expanduser().absolute())  # noqa: E731
        return dataclasses.replace(
            self,
            model=from_anywhere(self.model),
            task=from_anywhere(self.task),
            taps_folder=self.taps_folder and absolute(self.taps_folder),
            start=self.start if self.start in (None, *STARTS) else absolute(self.start),
        )

    def get_task(self) -> Task:
        task = get_task(self.task)
        if not task.is_language:
            raise ConfigError(
                f"{self.task} is a {task.problem} task: a side network continues texts; give a language task."
            )
        return task

    def load_model(self, mesh: Mesh | None = None, *, loaded: Model | None = None) -> Model:
        """The base as this run wants it: ``loaded``, or what its name stands for."""
        place = None if mesh is None else partial(sharding_of, mesh)
        if loaded is not None:
            return loaded.quantise(self.base_bits)
        return from_pretrained(self.model, head="lm", base_bits=self.base_bits, sharding=place)

    def load_data(self, task: Task, model: Model) -> dict[str, Encoded]:
        """The task, encoded by the tokenizer in the model's folder; of one user, if one is named: his splits.

        Raises:
            UnknownNameError: the user has no training examples. ConfigError: none to choose a threshold on.
        """
        data = load_task(task, model.source, max_length=self.max_length, limit=self.limit)
        if self.user is None:
            return data
        data["train"].of_user(self.user)
        his = {split: part.of_user(self.user) for split, part in data.items() if self.user in (part.users or ())}
        if "validation" not in his:
            raise ConfigError(f"user {self.user!r} has no validation examples, to choose a threshold on; give some.")
        return his

    def split(self, train: Encoded) -> tuple[Encoded, Encoded | None]:
        """Training examples of the side network and, for a gated setting, of the gate; the same for every seed."""
        held = round(self.gate.share * len(train)) if Setting.parse(self.setting).gated else 0
        if not held:
            return train, None
        order = np.random.default_rng(len(train)).permutation(len(train))
        return train.take(np.sort(order[held:])), train.take(np.sort(order[:held]))


def saved_fields(config: Any) -> dict[str, Any]:
    """For run.json: what is there since a later version is left out where it changes nothing, that older runs go on."""
    saved = dataclasses.asdict(config)
    if config.base_bits == 32:
        del saved["base_bits"]
    return saved
