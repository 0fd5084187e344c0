"""The objects that every part of a run uses (`Session`), and the outcome of its steps (`Trained`)."""

from collections.abc import Sequence
from dataclasses import dataclass

from prefcache.pipeline import identity
from prefcache.pipeline.config import Config
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.schema import HELD_OUT, TRAIN
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.records import BestEntry, RunInputs, StoppedEntry
from prefcache.pipeline.training import dataset
from prefcache.pipeline.training.callbacks import Callbacks
from prefcache.pipeline.training.dataset import Examples
from prefcache.pipeline.training.moving_reference import MovingReference
from prefcache.pipeline.training.objective import Objective
from prefcache.pipeline.training.policy import Policy
from prefcache.pipeline.training.run_log import RunLog
from prefcache.pipeline.training.sample_answers import Prompt


@dataclass
class Session:
    """The objects that every part of a run uses."""

    config: Config
    start: identity.Reference
    inputs: RunInputs
    examples: dict[str, Examples]
    cache: Cache | None
    objective: Objective
    policy: Policy
    moving: MovingReference | None
    log: RunLog
    progress: Progress
    callbacks: Callbacks
    own_prompts: Sequence[Prompt] = ()  # to answer in addition to evaluated ones

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.policy.accelerator.is_main_process)

    @property
    def evaluated(self) -> dict[str, Examples]:
        """The examples that are evaluated, by split."""
        return {split: each for split, each in self.examples.items() if split != TRAIN and len(each)}

    @property
    def shown(self) -> str:
        """The split whose prompts are answered and whose examples are shown token by token: held_out, else the first by name."""
        return min(self.evaluated, key=lambda split: (split != HELD_OUT, split), default=HELD_OUT)

    @property
    def n_steps(self) -> int:
        train = self.config.train
        return dataset.n_steps(len(self.examples[TRAIN]), train.batch_size, train.epochs, train.max_steps)


@dataclass(frozen=True)
class Trained:
    """The outcome of a run's steps."""

    steps: int
    seconds: float
    best: BestEntry | None  # None: the last step's weights are the ones that count
    evaluation: dict[str, float]  # of the weights that count
    stopped: StoppedEntry | None = None  # by a callback, before the last step
