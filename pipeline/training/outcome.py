"""What a run leaves when it is done: the model with its card, samples, the tokens that moved most; the manifest last."""

from collections import Counter
from typing import Any

import pyarrow as pa

from pipeline.schema import HELD_OUT, SAMPLES, TRAIN
from pipeline.stored import artifact
from pipeline.training import best, gains, measuring, modelcard, samples, watching
from pipeline.training.runlog import PARTS, PROVENANCE
from pipeline.training.session import Session, Trained


def commit(
    s: Session,
    before: dict[str, Any],
    trained: Trained,
    answers: list[str],
    tokens: pa.Table | None,
    state: dict[str, Any],
) -> dict[str, Any]:
    with artifact.commit_folder(s.config.run / "model") as folder:
        s.policy.save_model(folder, state)
        (folder / "README.md").write_text(_card(s, trained, before["evaluation"]), encoding="utf-8")
    answered = measuring.samples_of(s, before["answers"], answers)
    artifact.commit_bytes(s.config.run / samples.FILE, artifact.parquet(pa.Table.from_pylist(answered, schema=SAMPLES)))
    kinds = s.config.train.kinds
    raised = Counter(event["kind"] for event in s.log.rows("events"))
    summary = {
        "steps": trained.steps,
        **best.described(trained.best),
        "kind": s.objective.kind,
        "examples": len(s.examples[TRAIN]),
        "held_out": len(s.examples[HELD_OUT]),
        "loss": s.objective.name,
        "seconds": round(trained.seconds, 3),
        "start": before["start"],
        "changed_answers": sum(sample["before"] != sample["after"] for sample in answered),
        "before": {"evaluation": before["evaluation"], "kinds": samples.count_kinds(before["answers"], kinds)},
        "after": {"evaluation": trained.evaluation, "kinds": samples.count_kinds(answers, kinds)},
        "samples": sorted(answered, key=samples.how_unchanged)[:5],
        "model": [artifact.describe(file) for file in sorted((s.config.run / "model").iterdir())],
        "tokens": artifact.commit_file(s.config.run / gains.FILE, artifact.parquet(tokens))
        if tokens is not None
        else None,
        "alerts": dict(sorted(raised.items())),
        **{
            key: [artifact.describe(part) for part in sorted((s.config.run / table).glob("to-*.parquet"))]
            for table, key in PARTS.items()
        },
    }
    watching.say_how_many(s, raised)
    weights = s.start.weight_files if s.config.train.model else []
    artifact.commit_make_inputs(s.config.run, weights)
    artifact.commit_manifest(s.config.run, summary)
    return {**summary, "run": str(s.config.run), "changed": True}


def _card(s: Session, trained: Trained, before: dict[str, float]) -> str:
    facts = artifact.unseal(s.config.run / PROVENANCE, f"Delete {s.config.run} and train again.")
    facts |= {"kind": s.objective.kind, **best.described(trained.best)}
    counts = {"examples": len(s.examples[TRAIN]), "held_out": len(s.examples[HELD_OUT]), "steps": trained.steps}
    return modelcard.text(facts, counts, before, trained.evaluation)
