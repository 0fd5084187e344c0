"""Columns for losses, and calls as a step makes them: statistics over the whole batch first."""

import itertools

import torch

from prefcache.pipeline.training.losses import LOSSES

torch.set_num_threads(1)

LOGPS = ("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp")
LENGTHS = ("n_chosen_counted", "n_rejected_counted")
GRADES = ("chosen_score", "rejected_score")
LABELLED = ("completion_logp", "kl_logp", "ref_completion_logp", "ref_kl_logp")
COLUMNS = (*LOGPS, *LENGTHS, *GRADES, *LABELLED, "n_completion_counted", "label", "density_ratio")
# The policy learns through these. A mismatched answer only says how far it has moved.
LEARNT = ("chosen_logp", "rejected_logp", "completion_logp")


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def columns_of(rows, names=LOGPS):
    return {name: t(*values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}


def random_columns(n: int = 30, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    reference = {name: -60 * torch.rand(n, generator=draw, dtype=torch.float64) for name in LOGPS[2:]}
    policy = {
        name[4:]: each + 3 * torch.randn(n, generator=draw, dtype=torch.float64) for name, each in reference.items()
    }
    lengths = {name: torch.randint(1, 40, (n,), generator=draw).double() for name in LENGTHS}
    grades = {name: 3 * torch.randn(n, generator=draw, dtype=torch.float64) for name in GRADES}
    labelled = {name: -60 * torch.rand(n, generator=draw, dtype=torch.float64) for name in LABELLED}
    labelled["n_completion_counted"] = torch.randint(1, 40, (n,), generator=draw).double()
    labelled["label"] = torch.arange(n).remainder(3).gt(0).double()
    labelled["density_ratio"] = 15 * torch.rand(n, generator=draw, dtype=torch.float64)
    return policy | reference | lengths | grades | labelled


def extreme_columns(dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Every combination of log-probs at the ends and in the middle, with grades and lengths at theirs."""
    logps = list(itertools.product((-1e4, -1.0, 1e4), repeat=4))
    others = itertools.cycle(itertools.product((1.0, 8192.0), (1.0, 8192.0), (-3e38, 0.0, 3e38), (-3e38, 0.0, 1e-30)))
    rows = [(*row, *next(others)) for row in logps]
    pairs = {
        name: torch.tensor(values, dtype=dtype)
        for name, values in zip((*LOGPS, *LENGTHS, *GRADES), zip(*rows, strict=True), strict=True)
    }
    labelled = {name: pairs[like] for name, like in zip(LABELLED, LOGPS, strict=True)}
    labelled["n_completion_counted"] = pairs["n_chosen_counted"]
    labelled["label"] = torch.arange(len(rows)).remainder(2).to(dtype)
    labelled["density_ratio"] = torch.tensor([0.0, 1.0, 1e8], dtype=dtype).repeat(len(rows))[: len(rows)]
    return pairs | labelled


def statistics(name, columns, memory=None, learning=True, **hyper):
    """The statistics that a loss reads, and what they remember: {name: value}, {name: memory}."""
    arguments = LOSSES[name].hyperparameters | hyper
    values, after = {}, {}
    for each in LOSSES[name].statistics:
        given = [columns[column].detach() for column in each.columns]
        known = {key: arguments[key] for key in each.hyperparameters}
        if each.running:
            known |= {"running": (memory or {}).get(each.name), "learning": learning}
            values[each.name], after[each.name] = each.function(*given, **known)
        else:
            values[each.name] = each.function(*given, **known)
    some = columns[LOSSES[name].columns[0]]
    return {key: torch.as_tensor(value, dtype=some.dtype) for key, value in values.items()}, after


def call(name, columns, memory=None, found=None, **hyper) -> torch.Tensor:
    """The loss of each example, with the statistics of these columns unless others are `found`."""
    given = columns | (statistics(name, columns, memory, **hyper)[0] if found is None else found)
    return LOSSES[name].function(*(given[column] for column in LOSSES[name].reads), **hyper)


def gradients(name, columns, **hyper) -> list[torch.Tensor]:
    """Of the summed loss, by the policy's log-probs."""
    leaves = {column: columns[column].clone().requires_grad_() for column in learnt(name)}
    return list(torch.autograd.grad(call(name, columns | leaves, **hyper).sum(), list(leaves.values())))


def has_the_gradient_of_its_values(name, columns, **hyper) -> bool:
    """Compared with differences of values; statistics stay what they are, for no gradient flows through them."""
    found, _ = statistics(name, columns, **hyper)

    def value(*leaves):
        return call(name, columns | dict(zip(learnt(name), leaves, strict=True)), found=found, **hyper)

    return torch.autograd.gradcheck(value, [columns[column].clone().requires_grad_() for column in learnt(name)])


def learnt(name) -> list[str]:
    return [column for column in LEARNT if column in LOSSES[name].columns]


def is_finite(name, columns, **hyper) -> bool:
    results = [call(name, columns, **hyper), *gradients(name, columns, **hyper)]
    return all(bool(each.isfinite().all()) for each in results)
