"""The preference losses: one pure function each. `prefcache losses` lists them.

    pairs            the DPO family, under TRL's names and with its values
    targets          pairs whose margin has a target: from grades, from lengths, from the reference
    noise            pairs some of which are labelled wrongly, or lie too far from the reference
    labels           answers that are each good or not
    reference_free   pairs, and no reference

To add a loss, write a function in one of them, as registry.py says, and its test.
"""

from pipeline.training.losses import labels, noise, pairs, reference_free, targets
from pipeline.training.losses.registry import LOSSES, STATISTICS, Loss, Statistic, get_loss, hyperparameters

__all__ = [
    "LOSSES",
    "STATISTICS",
    "Loss",
    "Statistic",
    "get_loss",
    "hyperparameters",
    "labels",
    "noise",
    "pairs",
    "reference_free",
    "targets",
]
