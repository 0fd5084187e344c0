"""Every loss that TRL 1.16 has is TRL's own: its trainers compute one side, value and gradient agree to 1e-6.

Twice each. Through a tiny model: a trainer tokenizes, collates and runs the models, and ours reads its batch's ids. And from
numbers: a stand-in for the model hands the trainer per-token log-probs that no tiny model gives. Where TRL's result is
not finite, ours has to be all the same.

bco and kto_pair, which TRL no longer has, are in test_losses_labels.py and test_losses_pairs.py, against formulas.
Shapes: B pairs or labelled answers, T positions, P parameters.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from prefcache.pipeline.config import Train
from prefcache.pipeline.model.logprobs import padded_logps, sum_logps
from prefcache.pipeline.schema import TokenSequence
from prefcache.pipeline.training.losses import LOSSES
from prefcache.pipeline.training.losses.registry import DIVERGENCES
from prefcache.pipeline.training.objective import PLAIN, WEIGHT, Objective
from prefcache.pipeline.training.token_sums import Seed
from tests.helpers.losses import LEARNT, call
from tests.helpers.models import SIZES
from tests.helpers.project import WORDS
from tests.helpers.token_lists import answer_sums, wpo_weights

Columns = dict[str, torch.Tensor]

WITH_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
DPO = [
    ("sigmoid", {}),
    ("sigmoid", {"beta": 0.5}),
    ("sigmoid_norm", {}),
    ("sigmoid_norm", {"beta": 0.1}),
    ("hinge", {}),
    ("hinge", {"beta": 0.01}),
    ("ipo", {}),
    ("ipo", {"beta": 0.5}),
    ("exo_pair", {}),
    ("exo_pair", {"label_smoothing": 0.2}),
    ("nca_pair", {}),
    ("robust", {}),
    ("robust", {"label_smoothing": 0.0}),
    ("robust", {"label_smoothing": 0.3, "beta": 0.5}),
    ("bco_pair", {}),
    ("sppo_hard", {}),
    ("sppo_hard", {"beta": 1.0}),
    *((name, {"label_smoothing": share}) for name in ("aot", "aot_unpaired") for share in (0.0, 0.2, 1.0)),
    ("apo_zero", {}),
    ("apo_down", {}),
    ("discopop", {}),
    ("discopop", {"tau": 0.5, "beta": 0.02}),
    ("sft", {}),
    *(
        (name, {"f_divergence": divergence} | ({"f_alpha": alpha} if divergence == "alpha_divergence" else {}))
        for name in WITH_DIVERGENCE
        for divergence in DIVERGENCES[1:]
        for alpha in ((0.2, 0.5, 1.0, 1.5) if divergence == "alpha_divergence" else (None,))
    ),
]
KTO = [
    ("kto", {}),
    ("kto", {"beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.4}),
    ("apo_zero_unpaired", {}),
    ("apo_zero_unpaired", {"beta": 0.5, "desirable_weight": 0.0, "undesirable_weight": 2.0}),
]
CPO = [
    ("cpo", {}),
    ("cpo", {"beta": 0.5, "label_smoothing": 0.2, "nll": 0.3}),
    ("cpo", {"nll": 0.0}),
    ("cpo_hinge", {}),
    ("cpo_hinge", {"beta": 0.01, "nll": 2.0}),
    ("cpo_ipo", {}),
    ("cpo_ipo", {"beta": 1.0, "nll": 0.5}),
    ("simpo", {}),
    ("simpo", {"beta": 0.7, "gamma": 0.3, "label_smoothing": 0.2}),
    ("alphapo", {}),
    ("alphapo", {"alpha": -0.4, "gamma": 0.1}),
    ("alphapo", {"alpha": 0.0}),
]
ORPO = [("orpo", {}), ("orpo", {"beta": 1.5})]

# TRL's names for our losses and hyperparameters, where they are not ours.
OF_CPO = {
    "cpo": {"loss_type": "sigmoid"},
    "cpo_hinge": {"loss_type": "hinge"},
    "cpo_ipo": {"loss_type": "ipo"},
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0},
    "alphapo": {"loss_type": "simpo", "cpo_alpha": 0.0},
}
NAMES = {
    "f_divergence": "f_divergence_type",
    "f_alpha": "f_alpha_divergence_coef",
    "gamma": "simpo_gamma",
    "nll": "cpo_alpha",
}


def named(cases: list[tuple[str, dict[str, Any]]]) -> Any:
    ids = [" ".join([name, *(f"{key}={value}" for key, value in given.items())]) for name, given in cases]
    return pytest.mark.parametrize(("name", "given"), cases, ids=ids)


@pytest.fixture
def set_up(monkeypatch):
    """Gives a trainer one of our losses with its hyperparameters, for one test."""

    def set_up(trainer: Any, name: str, given: dict[str, Any]) -> Any:
        settings = {"use_weighting": False, "loss_types": [name], "loss_weights": [1.0]}
        if not isinstance(trainer, DPOTrainer):
            settings = OF_CPO.get(name, {"loss_type": name})
        arguments = LOSSES[name].hyperparameters | given
        arguments.pop("per_token", None)  # TRL's ipo always is
        if "tau" in arguments:
            monkeypatch.setattr(trainer.args, "discopop_tau", arguments.pop("tau"))
        settings = settings | {NAMES.get(key, key): value for key, value in arguments.items()}
        for key, value in settings.items():
            monkeypatch.setattr(trainer, key, value, raising=key != "loss_type")
        return trainer

    return set_up


# -- the trainers ----------------------------------------------------------------------------------------------------

N_PAIRS = 6
PAIRS = [
    {
        "prompt": " ".join(WORDS[i : i + 2 + i % 3]),
        "chosen": " " + " ".join(WORDS[i + 5 : i + 6 + i % 3]),
        "rejected": " " + " ".join(WORDS[i + 9 : i + 10 + i // 2]),
    }
    for i in range(N_PAIRS)
]


def load(seed: int) -> Any:
    """A Llama whose layers compute in float64: how float32 rounds them is not what is compared here."""
    torch.manual_seed(seed)
    config = LlamaConfig(**SIZES | {"vocab_size": len(WORDS) + 2, "initializer_range": 0.1})
    return LlamaForCausalLM(config).double()


def make(trainer: type, config: type, rows: list[dict[str, Any]], folder, *models: Any, **settings: Any) -> Any:
    arguments = config(
        output_dir=str(folder),
        per_device_train_batch_size=N_PAIRS,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        report_to="none",
        **settings,
    )
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    made = trainer(*models, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    made.batch = next(iter(made.get_train_dataloader()))
    return made


@pytest.fixture(scope="module")
def dpo(tmp_path_factory):
    return make(DPOTrainer, DPOConfig, PAIRS, tmp_path_factory.mktemp("dpo"), load(0), load(1), use_weighting=True)


@pytest.fixture(scope="module")
def kto(tmp_path_factory):
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": i % 3 > 0}
        for i, row in enumerate(PAIRS)
    ]
    return make(KTOTrainer, KTOConfig, rows, tmp_path_factory.mktemp("kto"), load(1), load(0))


@pytest.fixture(scope="module")
def cpo(tmp_path_factory):
    return make(CPOTrainer, CPOConfig, PAIRS, tmp_path_factory.mktemp("cpo"), load(0), loss_type="simpo")


@pytest.fixture(scope="module")
def orpo(tmp_path_factory):
    # TRL's likelihood is of the prompt's tokens as well, but for the first, which nothing predicts: so that is all of it.
    rows = [row | {"prompt": "why"} for row in PAIRS]
    return make(ORPOTrainer, ORPOConfig, rows, tmp_path_factory.mktemp("orpo"), load(0))


@pytest.fixture(scope="module")
def policy():
    return load(0)


@pytest.fixture(scope="module")
def reference():
    return load(1)


# -- through a model -------------------------------------------------------------------------------------------------


def sequences(ids_BT: torch.Tensor, answer_BT: torch.Tensor) -> list[TokenSequence]:
    """Prompt and answer of each row of a batch of TRL's; what follows the answer is padding."""
    found = []
    for ids_T, answer_T in zip(ids_BT.numpy(), answer_BT.bool().numpy(), strict=True):
        start, n = int(answer_T.argmax()), int(answer_T.sum())
        assert answer_T[start : start + n].all() and start > 0
        found.append(TokenSequence(ids_T[:start], ids_T[start : start + n]))
    return found


def lengths(answers: list[TokenSequence]) -> torch.Tensor:
    return torch.tensor([len(answer.completion_ids) for answer in answers], dtype=torch.float64)


def of_pairs(policy: Any, reference: Any, chosen: list[TokenSequence], rejected: list[TokenSequence]) -> Columns:
    columns = {"n_chosen_counted": lengths(chosen), "n_rejected_counted": lengths(rejected)}
    for name, answers in {"chosen": chosen, "rejected": rejected}.items():
        columns[f"{name}_logp"] = sum_logps(padded_logps(policy, answers).logps)
        if reference is not None:
            columns[f"ref_{name}_logp"] = sum_logps(padded_logps(reference, answers).logps).detach()
    return columns


def of_labels(policy: Any, reference: Any, batch: Any) -> Columns:
    columns = {"label": batch["label"].double()}
    for name, prefix in {"completion": "", "kl": "KL_"}.items():
        answers = sequences(batch[f"{prefix}input_ids"], batch[f"{prefix}completion_mask"])
        columns[f"{name}_logp"] = sum_logps(padded_logps(policy, answers).logps)
        columns[f"ref_{name}_logp"] = sum_logps(padded_logps(reference, answers).logps).detach()
    return columns | {"kl_logp": columns["kl_logp"].detach()}


def assert_same_step(theirs: torch.Tensor, their_model: Any, ours: torch.Tensor, our_model: Any, columns: Columns):
    """Gradients, to 1e-6 of what the answers' make together before those of chosen and rejected cancel."""
    answers = [columns[name] for name in LEARNT if name in columns]
    slopes = torch.autograd.grad(ours, answers, retain_graph=True, materialize_grads=True)
    uncancelled_P = gradient(answers, our_model, [slope.abs() for slope in slopes])
    their_P, our_P = gradient([theirs], their_model), gradient([ours], our_model)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert (our_P - their_P).norm() <= 1e-6 * uncancelled_P.norm()
    assert their_P.norm() > 0


def gradient(values: list[torch.Tensor], model: Any, by: list[torch.Tensor] | None = None) -> torch.Tensor:
    found = torch.autograd.grad(values, list(model.parameters()), by, retain_graph=True)
    return torch.cat([each.flatten() for each in found])


@named(DPO)
def test_a_step_of_dpo_is_trls(name, given, dpo, set_up, policy, reference):
    theirs = set_up(dpo, name, given).compute_loss(dpo.model, dpo.batch)
    both = sequences(dpo.batch["input_ids"], dpo.batch["completion_mask"])
    columns = of_pairs(policy, reference, both[:N_PAIRS], both[N_PAIRS:])
    assert_same_step(theirs, dpo.model, call(name, columns, **given).mean(), policy, columns)


@named(KTO)
def test_a_step_of_kto_is_trls(name, given, kto, set_up, policy, reference):
    theirs = set_up(kto, name, given).compute_loss(kto.model, kto.batch)
    # The two change places here, or z would be 0.
    columns = of_labels(reference, policy, kto.batch)
    assert (columns["kl_logp"] - columns["ref_kl_logp"]).mean() > 0.1
    assert_same_step(theirs, kto.model, call(name, columns, **given).mean(), reference, columns)


@named(CPO + ORPO)
def test_a_step_of_cpo_and_orpo_is_trls(name, given, request, set_up, policy):
    trainer = request.getfixturevalue("orpo" if name == "orpo" else "cpo")
    theirs = set_up(trainer, name, given).compute_loss(trainer.model, trainer.batch)
    chosen, rejected = (
        sequences(trainer.batch[f"{side}_input_ids"], trainer.batch[f"{side}_labels"] != -100)
        for side in ("chosen", "rejected")
    )
    columns = of_pairs(policy, None, chosen, rejected)
    assert_same_step(theirs, trainer.model, call(name, columns, **given).mean(), policy, columns)


# -- from numbers ----------------------------------------------------------------------------------------------------

# Pairs as (chosen, rejected, ref chosen, ref rejected, tokens of chosen, of rejected). All are multiples of 1/8, so that
# float32 sums them exactly and only the losses themselves can round.
SHAPES = {
    "ordinary": [
        (-20.5, -31.25, -22, -30, 7, 9),
        (-8, -8.5, -9.25, -7, 3, 2),
        (-40, -35.5, -38.125, -36.75, 12, 11),
        (-15, -60, -18.5, -55.25, 5, 20),
    ],
    "policy is reference": [(-20, -30, -20, -30, 5, 8), (-4.5, -4.5, -4.5, -4.5, 1, 2), (-9, -2, -9, -2, 6, 1)],
    "ties": [(-20, -30, -22, -29, 5, 8), (-10, -20, -12, -19, 2, 9), (-14, -24, -16, -23, 7, 7)],
    "one token": [(-2.5, -4, -3, -3.5, 1, 1), (-0.125, -6, -1, -5, 1, 1)],
    "5000 tokens": [
        (-5000, -5600, -5003, -5590, 5000, 4990),
        (-1.5, -5200, -2, -5190, 1, 5000),
        (-5100, -3, -5104, -2.5, 5000, 1),
    ],
    "gaps of 500": [
        (-100, -100, -600, -600, 40, 50),
        (-100, -600, -600, -100, 40, 50),
        (-600, -100, -100, -600, 40, 50),
        (-600, -600, -100, -100, 1, 2),
    ],
}


def spread(total: float, n: int, room: int) -> list[float]:
    """Over n tokens of a row, in multiples of 1/1024, exactly."""
    each = int(1024 * total / n) / 1024
    return [each] * (n - 1) + [total - each * (n - 1)] + [0.0] * (room - n)


def table(totals: list[float], counts: list[int], room: int) -> torch.Tensor:
    return torch.tensor([spread(total, n, room) for total, n in zip(totals, counts, strict=True)])


def answer_mask(counts: list[int], room: int) -> torch.Tensor:
    """Of rows with a prompt of one token."""
    position_T = torch.arange(1 + room)
    return ((position_T > 0) & (position_T <= torch.tensor(counts).unsqueeze(1))).long()


class Given:
    """Stands for a model: to a batch whose ids are all k, it gives the k-th table of log-probs."""

    def __init__(self, *tables: torch.Tensor) -> None:
        self.tables = tables

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logps_BT = self.tables[int(input_ids[0, 0])]
        zeros_BT = torch.zeros_like(logps_BT)
        return SimpleNamespace(
            log_probs=logps_BT,
            log_sum_sq_probs=logps_BT.detach() / 2,
            **{"entropy": zeros_BT, "mean_logits": zeros_BT, "is_top1": zeros_BT.bool()},  # TRL logs these
        )


def assert_same_numbers(
    theirs: torch.Tensor, ours: torch.Tensor, leaf_BT: torch.Tensor, mask_BT: torch.Tensor, unit: float
) -> None:
    """To 1e-6, or to float32's 1e-7 of a gradient's unit where terms cancel or s(x) is all but 0 or 1."""
    (our_BT,) = torch.autograd.grad(ours, leaf_BT)
    assert torch.isfinite(ours) and torch.isfinite(our_BT).all()
    if torch.isfinite(theirs):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6, abs=1e-7)
        (their_BT,) = torch.autograd.grad(theirs, leaf_BT)
        seen_BT = mask_BT[:, 1:].bool() & torch.isfinite(their_BT)
        torch.testing.assert_close(our_BT[seen_BT], their_BT[seen_BT], rtol=1e-6, atol=1e-7 * unit)


def unit(names: Any, beta: float, mask_BT: torch.Tensor) -> float:
    """beta, or that per token for losses that take means."""
    takes_means = any(column.startswith("n_") for name in names for column in LOSSES[name].columns)
    return beta / int(mask_BT.sum(1).max()) if takes_means else beta


def batches(name: str, rows: list[Any]) -> list[list[Any]]:
    """All at once and, if the loss is not over the batch, each by itself."""
    return [rows] if LOSSES[name].over_batch else [rows, *([row] for row in rows)]


def pairs_of_numbers(rows: list[Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """TRL's batch, chosen answers before rejected ones, and the per-token log-probs of policy and reference."""
    chosen, rejected, ref_chosen, ref_rejected, n_chosen_counted, n_rejected_counted = map(
        list, zip(*rows, strict=True)
    )
    counts = n_chosen_counted + n_rejected_counted
    mask_BT = answer_mask(counts, max(counts))
    batch = {"input_ids": torch.zeros_like(mask_BT), "attention_mask": mask_BT, "completion_mask": mask_BT}
    policy_BT, reference_BT = (
        table(totals, counts, max(counts)) for totals in (chosen + rejected, ref_chosen + ref_rejected)
    )
    return batch, policy_BT.requires_grad_(), reference_BT


def columns_of(batch: dict[str, torch.Tensor], policy_BT: torch.Tensor, reference_BT: torch.Tensor | None) -> Columns:
    columns = {}
    for prefix, table_BT in {"": policy_BT, "ref_": reference_BT}.items():
        if table_BT is not None:
            columns[f"{prefix}chosen_logp"], columns[f"{prefix}rejected_logp"] = table_BT.sum(1).chunk(2)
    columns["n_chosen_counted"], columns["n_rejected_counted"] = batch["completion_mask"].sum(1).float().chunk(2)
    return columns


@pytest.mark.parametrize("shape", SHAPES)
@named(DPO)
def test_numbers_of_dpo_are_trls(name, given, shape, dpo, set_up, monkeypatch):
    set_up(dpo, name, given)
    for rows in batches(name, SHAPES[shape]):
        batch, policy_BT, reference_BT = pairs_of_numbers(rows)
        mask_BT = batch["completion_mask"]
        monkeypatch.setattr(dpo, "ref_model", Given(reference_BT))
        theirs = dpo.compute_loss(Given(policy_BT), batch)
        ours = call(name, columns_of(batch, policy_BT, reference_BT), **given).mean()
        assert_same_numbers(theirs, ours, policy_BT, mask_BT, unit([name], dpo.beta, mask_BT))


# Labelled answers as (log-prob, the reference's, tokens, label, log-prob of the mismatched answer, the reference's).
LABELLED = {
    "z above 0": [(-20, -22.5, 7, 1, -30, -33), (-15, -14, 4, 0, -50, -52), (-8, -3, 2, 1, -9, -8.5)],
    "z cut at 0": [(-20, -22.5, 7, 1, -30, -23), (-15, -14, 4, 0, -50, -52), (-8, -3, 2, 0, -9, -8.5)],
    "none undesirable": [(-20, -22.5, 7, 1, -30, -33), (-15, -14, 4, 1, -50, -52)],
    "none desirable": [(-20, -22.5, 7, 0, -30, -33), (-15, -14, 4, 0, -50, -52)],
    "policy is reference": [(-20, -20, 7, 1, -30, -30), (-15, -15, 4, 0, -50, -50)],
    "5000 tokens": [(-5000, -5003, 5000, 1, -4000, -4001), (-1.5, -2, 1, 0, -5100, -5101)],
    "gaps of 500": [
        (-100, -600, 40, 1, -100, -101),
        (-600, -100, 40, 1, -100, -101),
        (-100, -600, 40, 0, -100, -101),
        (-600, -100, 40, 0, -100, -101),
    ],
    "z of 500": [(-20, -22.5, 7, 1, -30, -530), (-15, -14, 4, 0, -50, -550)],
}


@pytest.mark.parametrize("shape", LABELLED)
@named(KTO)
def test_numbers_of_kto_are_trls(name, given, shape, kto, set_up, monkeypatch):
    logp, ref, counts, label, kl, ref_kl = map(list, zip(*LABELLED[shape], strict=True))
    room, mask_BT = max(counts), answer_mask(counts, max(counts))
    completion_BT = table(logp, counts, room).requires_grad_()
    tables = [table(totals, counts, room) for totals in (kl, ref, ref_kl)]
    batch = {"input_ids": torch.zeros_like(mask_BT), "KL_input_ids": torch.ones_like(mask_BT)}
    batch |= {f"{prefix}{key}": mask_BT for prefix in ("", "KL_") for key in ("attention_mask", "completion_mask")}
    batch["label"] = torch.tensor(label).bool()
    monkeypatch.setattr(set_up(kto, name, given), "ref_model", Given(*tables[1:]))
    theirs = kto.compute_loss(Given(completion_BT, tables[0]), batch)
    names = ("kl_logp", "ref_completion_logp", "ref_kl_logp")
    columns = {column: each_BT.sum(1) for column, each_BT in zip(names, tables, strict=True)}
    columns |= {"completion_logp": completion_BT.sum(1), "label": batch["label"].float()}
    assert_same_numbers(theirs, call(name, columns, **given).mean(), completion_BT, mask_BT, kto.beta)


class GivenLogits:
    def __init__(self, logits_BTV: torch.Tensor) -> None:
        self.logits = logits_BTV

    def __call__(self, *_: Any, **__: Any) -> "GivenLogits":
        return self


@pytest.mark.parametrize("shape", SHAPES)
@named(CPO + ORPO)
def test_numbers_of_cpo_and_orpo_are_trls(name, given, shape, request, set_up):
    trainer = set_up(request.getfixturevalue("orpo" if name == "orpo" else "cpo"), name, given)
    for rows in batches(name, SHAPES[shape]):
        numbers, policy_BT, _ = pairs_of_numbers(rows)
        mask_BT = numbers["completion_mask"]
        # These trainers take logits: of two tokens, the first of which is always the one that comes.
        logit_BT = (policy_BT - torch.log(-torch.expm1(policy_BT))).detach().nan_to_num(0, 0, 0).requires_grad_()
        logits_BTV = torch.stack([logit_BT, torch.zeros_like(logit_BT)], -1)
        batch = {}
        for side, half_BT in zip(("chosen", "rejected"), mask_BT.chunk(2), strict=True):
            batch[f"{side}_input_ids"] = torch.zeros_like(half_BT)
            batch[f"{side}_attention_mask"] = half_BT  # of the answer only, which is what ORPO's likelihood is then of
            batch[f"{side}_labels"] = half_BT - 1
            batch[f"{side}_labels"][half_BT == 0] = -100
        padded_BTV = torch.nn.functional.pad(logits_BTV, (0, 0, 0, 1))
        theirs = trainer.compute_loss(GivenLogits(padded_BTV), batch)
        logps_BT = (logit_BT - logits_BTV.logsumexp(-1)) * mask_BT[:, 1:]
        columns = columns_of(numbers, logps_BT, None)
        assert_same_numbers(
            theirs, call(name, columns, **given).mean(), logit_BT, mask_BT, unit([name], trainer.beta, mask_BT)
        )


# -- above single losses ---------------------------------------------------------------------------------------------

# Not here: hinge and sft with WPO, where TRL's backward fails.
COMBINED = {
    "MPO": {"loss": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}},
    "a sum with one label smoothing": {"loss": {"robust": 0.5, "aot": 2.0}, "loss_args": {"label_smoothing": 0.2}},
    "LD-DPO": {"loss": "sigmoid", "tokens": {"ld_alpha": 0.25}},
    "LD-DPO without a tail": {"loss": "hinge", "tokens": {"ld_alpha": 0.0}},
    "LD with per-token means": {"loss": {"ipo": 1.0, "sigmoid_norm": 0.5}, "tokens": {"ld_alpha": 0.25}},
    "LD beside a likelihood that it leaves alone": {"loss": {"sigmoid": 1.0, "sft": 0.5}, "tokens": {"ld_alpha": 0.25}},
    "LD over the batch": {"loss": "aot_unpaired", "tokens": {"ld_alpha": 0.25}},
    "WPO": {"loss": "sigmoid", "weighting": "wpo"},
    "WPO of a sum": {"loss": {"sigmoid": 1.0, "ipo": 0.1}, "weighting": "wpo"},
    "WPO and LD": {"loss": "sigmoid", "weighting": "wpo", "tokens": {"ld_alpha": 0.5}},
}
combined = pytest.mark.parametrize("train", [Train(beta=0.2, **each) for each in COMBINED.values()], ids=COMBINED)


@pytest.fixture
def set_up_combined(dpo, monkeypatch):
    def set_up(train: Train) -> None:
        weights = train.loss if isinstance(train.loss, dict) else {train.loss: 1.0}
        settings = {"loss_types": list(weights), "loss_weights": list(weights.values()), "beta": train.beta}
        settings |= {"label_smoothing": train.loss_args.get("label_smoothing", 0.0), "f_divergence_type": "reverse_kl"}
        settings |= {"ld_alpha": train.tokens.ld_alpha, "use_weighting": train.weighting == "wpo"}
        for key, value in settings.items():
            monkeypatch.setattr(dpo, key, value)

    return set_up


def objective_of(
    train: Train, policy: list[torch.Tensor], reference: list[torch.Tensor], squares: list[torch.Tensor]
) -> tuple[torch.Tensor, Columns]:
    """Our loss and the columns it reads, from the log-probs of each answer's tokens, chosen answers first."""
    of_policy, of_reference, of_squares = (
        {"chosen": lists[: len(lists) // 2], "rejected": lists[len(lists) // 2 :]}
        for lists in (policy, reference, squares)
    )
    columns = {
        f"n_{name}_counted": torch.tensor([len(each) for each in lists]).double() for name, lists in of_policy.items()
    }
    columns |= {f"ref_{name}_logp": sum_logps(lists) for name, lists in of_reference.items()}
    columns |= {f"{PLAIN}{name}_logp": sum_logps(lists) for name, lists in of_policy.items()}
    columns |= answer_sums(of_policy, of_reference, train.tokens, Seed(0, 0, range(len(policy) // 2)))
    if train.weighting:
        columns[WEIGHT] = wpo_weights(of_policy, of_squares)
    objective = Objective(train)
    statistics, *_ = objective.compute_statistics(columns, {}, learning=True)
    return objective.compute_losses(columns, statistics)[0].mean(), columns


@combined
def test_a_combined_step_of_dpo_is_trls(train, dpo, set_up_combined, policy, reference):
    set_up_combined(train)
    theirs = dpo.compute_loss(dpo.model, dpo.batch)
    both = sequences(dpo.batch["input_ids"], dpo.batch["completion_mask"])
    computed = padded_logps(policy, both, squares=True)
    with torch.no_grad():
        ref_logps = padded_logps(reference, both).logps
    ours, columns = objective_of(train, computed.logps, ref_logps, computed.squares)
    assert_same_step(theirs, dpo.model, ours, policy, columns)


@pytest.mark.parametrize("shape", SHAPES)
@combined
def test_combined_numbers_of_dpo_are_trls(train, shape, dpo, set_up_combined, monkeypatch):
    set_up_combined(train)
    batch, policy_BT, reference_BT = pairs_of_numbers(SHAPES[shape])
    mask_BT = batch["completion_mask"]
    monkeypatch.setattr(dpo, "ref_model", Given(reference_BT))
    theirs = dpo.compute_loss(Given(policy_BT), batch)
    logps, ref_logps, squares = (
        [row_T[:n] for row_T, n in zip(table_BT, mask_BT.sum(1).tolist(), strict=True)]
        for table_BT in (policy_BT, reference_BT, policy_BT.detach() / 2)
    )
    ours, _ = objective_of(train, logps, ref_logps, squares)
    assert_same_numbers(theirs, ours, policy_BT, mask_BT, unit(dpo.loss_types, train.beta, mask_BT))
