"""What every part of a run needs, and what its steps have led to."""

from dataclasses import dataclass
from typing import Any

from pipeline import identity
from pipeline.config import Config
from pipeline.progress import Progress
from pipeline.schema import TRAIN
from pipeline.stored.cache import Cache
from pipeline.training import batches, best
from pipeline.training.batches import Examples
from pipeline.training.moving_reference import MovingReference
from pipeline.training.objective import Objective
from pipeline.training.policy import Policy
from pipeline.training.runlog import RunLog


@dataclass
class Session:
    """What every part of a run needs."""

    config: Config
    start: identity.Reference
    inputs: dict[str, Any]
    examples: dict[str, Examples]
    cache: Cache | None
    objective: Objective
    policy: Policy
    moving: MovingReference | None
    log: RunLog
    progress: Progress

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.policy.accelerator.is_main_process)

    @property
    def n_steps(self) -> int:
        train = self.config.train
        return batches.n_steps(len(self.examples[TRAIN]), train.batch_size, train.epochs)


@dataclass(frozen=True)
class Trained:
    """What a run's steps have led to."""

    steps: int
    seconds: float
    best: best.Found | None  # None: the last step's weights are the ones that count
    evaluation: dict[str, float]  # of the weights that count
