"""The preference losses: one pure function each. `prefcache losses` lists them.

In go columns of log-probs, lengths and labels, one value per example; out comes one loss per example. registry.py says how a
signature declares what a loss reads: start there.

    pairs            the DPO family, under TRL's names and with its values
    margin_targets   pairs whose margin has a target: from grades, from lengths, from the reference
    noise            pairs of which some are mislabelled, or lie too far from the reference
    labels           single answers with a label, good or not
    reference_free   pairs without a reference

To add a loss, write a function in one of them, and its test.
"""

from prefcache.pipeline.training.losses import labels, margin_targets, noise, pairs, reference_free
from prefcache.pipeline.training.losses.registry import LOSSES, STATISTICS, Loss, Statistic, get_loss, hyperparameters

__all__ = [
    "LOSSES",
    "STATISTICS",
    "Loss",
    "Statistic",
    "get_loss",
    "hyperparameters",
    "labels",
    "margin_targets",
    "noise",
    "pairs",
    "reference_free",
]
