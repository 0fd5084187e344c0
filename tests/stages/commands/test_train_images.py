"""Training on prompts with pictures: the frozen tower computes each once and is not loaded; or the tower is trained as well."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from prefcache.pipeline import image_processor
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.model import tower, weights
from prefcache.pipeline.model.logprobs import plain_logps
from prefcache.pipeline.model.vision import Vision, VisionTower
from prefcache.pipeline.stored.image_features import FeatureStore
from prefcache.pipeline.stored.prepared import Prepared, Sequences
from prefcache.pipeline.training.run_images import RunImages
from tests.helpers import vision_data, vision_models
from tests.helpers.project import invoke, options
from tests.helpers.runs import metrics, table

QWEN, GEMMA, LLAVA = "qwen2.5-vl", "gemma3", "llava-onevision"


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Projects by family, prepared and scored."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = vision_data.write_project(tmp_path_factory.mktemp(name), vision_models.save(name))
            invoke(made[name], "score", "config.yaml", *options("score.parity_sample=2"))
        return made[name]

    return get


def train(project: Path, run: str, *settings: str, code: int = 0) -> Path:
    settings = (f"train.run={run}", *settings)
    done = invoke(project, "train", "config.yaml", *options(*settings), code=code)
    folder = project / "runs/tiny" / run
    folder.mkdir(exist_ok=True)
    (folder.parent / f"{run}.log").write_text(done.stderr)
    return folder


def said(run: Path) -> str:
    return (run.parent / f"{run.name}.log").read_text()


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run)]


def stores(project: Path) -> list[Path]:
    return sorted((project / "cache").glob("vision-*"))


def saved(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model/model.safetensors")


def tower_of(folder: Path) -> dict[str, torch.Tensor]:
    return weights.read_tower(folder)


def recorded(run: Path) -> dict[str, tuple[float, float]]:
    """The log-probs of the held-out answers after the last step, as the run noted them."""
    rows = [row for row in table(run, "steps") if row["split"] == "held_out"]
    last = max(row["step"] for row in rows)
    return {row["example_id"]: (row["chosen_logp"], row["rejected_logp"]) for row in rows if row["step"] == last}


def computed(project: Path, model) -> dict[str, tuple[float, float]]:
    """The same by the model's own forward of each answer, from the pixels of its processor."""
    prepared = Prepared(project / "runs/tiny/prepared")
    images = prepared.prompt_images(project / "processor")
    vision, examples = Vision(model, VisionTower(model, images), images), prepared.table("held_out")
    sequences, counted = Sequences(examples), [examples[f"{side}_spans"].to_pylist() for side in ("chosen", "rejected")]
    found = {}
    with torch.no_grad():
        for row, name in enumerate(examples["example_id"].to_pylist()):
            sums = []
            for side in range(2):
                spans = counted[side][row]
                places = np.concatenate([np.arange(*spans[i : i + 2]) for i in range(0, len(spans), 2)])
                sequence = sequences[2 * row + side]._replace(counted=places)
                sums.append(float(plain_logps(model, sequence, vision).double().sum()))
            found[name] = tuple(sums)
    return found


def keep_processor(project: Path, folder: Path) -> None:
    shutil.rmtree(project / "processor", ignore_errors=True)
    shutil.copytree(folder, project / "processor")


# -- a frozen tower --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layout"), [(QWEN, "auto"), (QWEN, "padded"), (GEMMA, "auto"), (LLAVA, "auto")])
def test_stored_features_give_the_run_of_a_tower_in_memory(scored, monkeypatch, name, layout):
    project, settings = scored(name), [f"train.rows={layout}"]
    stored = train(project, f"stored-{layout}", *settings)

    def attach(self: RunImages, model, device) -> Vision:
        for parameter in tower.tower_parameters(model).values():
            parameter.requires_grad_(False)
        assert tower.tower_parameters(model)
        return Vision(model, VisionTower(model, self.inputs))

    monkeypatch.setattr(RunImages, "attach", attach)
    monkeypatch.setattr(RunImages, "trains_tower", True)
    live = train(project, f"live-{layout}", *settings)
    assert losses(stored) == losses(live) and len({*losses(stored)}) > 2
    assert table(stored, "steps") == table(live, "steps")
    ours, theirs = saved(stored), saved(live)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_tower_is_in_memory_only_until_its_pictures_are_computed(scored, monkeypatch):
    loaded = []
    load_base = weights.load_base

    def note(*given):
        loaded.append((given[-1], model := load_base(*given)))
        return model

    monkeypatch.setattr(weights, "load_base", note)
    shutil.rmtree(scored(QWEN) / "runs/tiny/first", ignore_errors=True)
    for store in stores(scored(QWEN)):
        shutil.rmtree(store)
    train(scored(QWEN), "first")
    (part, seeing), (other, policy) = loaded
    assert (part, other) == ("tower", "language")
    n_bytes = [sum(p.nbytes for p in model.parameters()) for model in (seeing, policy)]
    whole = vision_models.load(vision_models.save(QWEN))
    assert sum(n_bytes) == sum(p.nbytes for p in whole.parameters()) and not tower.tower_parameters(policy)
    loaded.clear()
    second = train(scored(QWEN), "second", "train.seed=1")
    assert [part for part, _ in loaded] == ["language"], "the second run computes no picture"
    assert "computes" not in said(second)


def test_scoring_and_training_compute_each_picture_once_together(tmp_path, monkeypatch):
    from prefcache.pipeline.model import vision

    project = vision_data.write_project(tmp_path, vision_models.save(GEMMA))
    n_pictures, encoded = len(Prepared(project / "runs/tiny/prepared").images()), []
    encode_image = vision.encode_image

    def note(model, inputs):
        encoded.append(inputs)
        return encode_image(model, inputs)

    for module in ("scoring.cached_features", "training.run_images", "model.vision"):
        monkeypatch.setattr(f"prefcache.pipeline.{module}.encode_image", note)
    # The sample is checked by the plain forward from pixels, without features.
    invoke(project, "score", "config.yaml", *options("score.parity_sample=2"))
    run = train(project, "after")
    assert len(encoded) == n_pictures > 10 and len(stores(project)) == 1
    assert metrics(run)[0]["rewards/margins"] == 0
    train(project, "bf16", "train.weights=bfloat16")
    assert len(encoded) == 2 * n_pictures and len(stores(project)) == 2, "another dtype, other features"


def test_a_store_belongs_to_the_weights_of_its_tower(scored, tmp_path):
    project = scored(QWEN)
    train(project, "reference")
    before = stores(project)
    start = vision_models.save(QWEN)
    for part, same in (("lm_head", True), ("visual.merger", False)):
        changed = shutil.copytree(start, tmp_path / part)
        tensors = load_file(changed / "model.safetensors")
        save_file(
            {key: value * 1.5 if key.startswith(part) else value for key, value in tensors.items()},
            changed / "model.safetensors",
            {"format": "pt"},
        )
        run = train(project, f"from-{part}", f"train.model={changed}")
        assert (stores(project) == before) is same
        kept = tower_of(run / "model")
        assert all(torch.equal(kept[key], value) for key, value in tower_of(changed).items())


@pytest.mark.parametrize(
    "settings", [[], ["train.lora={r: 4}"], ["train.vision=trained"]], ids=["whole", "lora", "tower"]
)
@pytest.mark.parametrize("name", [QWEN, GEMMA])
def test_the_saved_model_computes_what_the_policy_did(scored, name, settings):
    project = scored(name)
    keep_processor(project, vision_models.save(name))
    run = train(project, f"saved-{'-'.join(settings)[6:10]}", *settings)
    folder = run / "model"
    if "lora" in str(settings):
        base = weights.load_base(Reference(vision_models.save(name)), "float32", "sdpa", "cpu")
        model = weights.load_frozen_adapter(base, folder, "cpu").eval()
        assert not (folder / "model.safetensors").exists()
    else:
        model = vision_models.load(folder)
        assert image_processor.load(folder).id == image_processor.load(vision_models.save(name)).id
    ours, theirs = recorded(run), computed(project, model)
    assert ours.keys() == theirs.keys() and len(ours) >= 3
    for name_ in ours:
        assert ours[name_] == pytest.approx(theirs[name_], abs=2e-3)
    assert ours != recorded(train(project, "other", "train.learning_rate=1e-5"))


def test_a_merged_adapter_is_a_whole_model(scored):
    project, start = scored(GEMMA), vision_models.save(GEMMA)
    keep_processor(project, start)
    run = train(project, "to-merge", "train.lora={r: 4}")
    invoke(project, "merge", run)
    merged, before = tower_of(run / "merged"), tower_of(start)
    assert all(torch.equal(merged[key], value) for key, value in before.items())
    assert image_processor.load(run / "merged").id == image_processor.load(start).id
    ours, theirs = recorded(run), computed(project, vision_models.load(run / "merged"))
    for example in ours:
        assert ours[example] == pytest.approx(theirs[example], abs=2e-3)


def test_damaged_features_are_noticed_and_computed_again(scored):
    project = scored(QWEN)
    whole = train(project, "whole")
    expected, store = losses(whole), project / re.search(r"(\S+) has its features", said(whole))[1]
    shard = min(store.glob("*.arrow"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    done = invoke(project, "verify", "cache", code=4)
    assert shard.name in done.stdout + done.stderr or shard.stem.partition("-")[0] in done.stdout + done.stderr
    again = train(project, "again")
    assert "computes" in said(again) and losses(again) == expected
    assert not FeatureStore(store).damaged
    invoke(project, "verify", "cache")
    invoke(project, "gc", "cache")


# -- a tower that is trained -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [QWEN, GEMMA, LLAVA])
def test_a_trained_tower_learns_and_is_saved(scored, name):
    project, start = scored(name), tower_of(vision_models.save(name))
    run = train(project, "trained-tower", "train.vision=trained", "train.weight_decay=0.5")
    after = tower_of(run / "model")
    changed = {key for key in start if not torch.equal(start[key], after[key])}
    # SigLIP has a pooling head, which the features do not depend on: neither trained nor decayed.
    unused = {key for key in start if "vision_tower.head" in key}
    assert unused == {key for key in start if "vision_tower.head" in key and key not in changed}
    assert len(changed) > 0.8 * (len(start) - len(unused)) and not changed & unused
    assert losses(run) != losses(train(project, "frozen-tower", "train.weight_decay=0.5"))


def test_recomputed_layers_change_nothing(scored):
    project = scored(QWEN)
    kept = train(project, "kept", "train.vision=trained")
    recomputed = train(project, "recomputed", "train.vision=trained", "train.gradient_checkpointing=true")
    assert losses(recomputed) == pytest.approx(losses(kept), abs=1e-6)
    ours, theirs = saved(recomputed), saved(kept)
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in ours)


@pytest.mark.parametrize("vision", ["frozen", "trained"])
def test_a_resumed_run_ends_with_the_same_weights(scored, vision):
    project = scored(QWEN)
    settings = [f"train.vision={vision}", "train.checkpoint_every=2", "train.checkpoints_at_end=keep", "train.epochs=2"]
    whole = train(project, f"whole-{vision}", *settings)
    resumed = whole.with_name(f"resumed-{vision}")
    shutil.copytree(whole, resumed)
    (resumed / "manifest.json").unlink()
    shutil.rmtree(sorted((resumed / "checkpoints").iterdir())[-1])
    train(project, resumed.name, *settings)
    assert "resuming" in said(resumed)
    assert (resumed / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    assert losses(resumed) == losses(whole)


@pytest.mark.parametrize("vision", ["frozen", "trained"])
def test_a_moving_reference_has_the_policy_s_tower(scored, vision):
    """Right after it moved, policy and reference are the same, so the loss of a step is log 2."""
    run = train(
        scored(QWEN),
        f"moving-{vision}",
        f"train.vision={vision}",
        "train.moving_reference={every: 2, alpha: 1}",
        "train.warmup_steps=0",
    )
    by_step = {row["step"]: row["loss"] for row in metrics(run)}
    assert by_step[3] == pytest.approx(np.log(2), abs=1e-6)
    assert abs(by_step[4] - np.log(2)) > 1e-4


# -- answers, text, refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(vision_models.FAMILIES))
def test_answers_to_prompts_with_pictures_are_greedy(name):
    """Token by token the most likely one, by the model's own forward with the pixels of its processor."""
    from accelerate import Accelerator

    from prefcache.pipeline.image_processor import PromptImages
    from prefcache.pipeline.model.forward import Forward
    from prefcache.pipeline.model.vision import ComputedFeatures, encode_image, pack
    from prefcache.pipeline.schema import TokenSequence
    from prefcache.pipeline.tokenizer import load_tokenizer
    from prefcache.pipeline.training.distributed import Calls
    from prefcache.pipeline.training.generation import generate_answers

    folder = vision_models.save(name)
    pictures = vision_models.Pictures(image_processor.load(folder))
    inputs, tokenizer = PromptImages(pictures.processor, pictures), load_tokenizer(folder)
    prompts = [
        TokenSequence(ids, np.empty(0, np.int32), images=images)
        for shown, question in (([vision_models.picture(40, 24)], "why?"), ([], "the"), ([], "a dog runs"))
        for ids, images in [vision_models.ask(folder, pictures, shown, question)]
    ]
    whole = vision_models.load(folder)

    class Shelf:
        dtype = "float32"

        def read(self, image):
            return pack(encode_image(whole, inputs.inputs(image)))

    with torch.no_grad():
        language = weights.load_base(Reference(folder), "float32", "sdpa", "cpu", "language")
        forward = Forward(language, "sdpa", "padded", "float32", "", Vision(language, ComputedFeatures(Shelf(), "cpu")))
        options_ = {"max_new_tokens": 6, "max_length": 4096, "budget": 512, "sharded": False}
        answers = generate_answers(Calls(forward), tokenizer, Accelerator(cpu=True), prompts, **options_)
        vision, end = Vision(whole, VisionTower(whole, inputs), inputs), whole.generation_config.eos_token_id
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = prompt.prompt_ids.tolist()
            for _ in range(6):
                more = vision.plain_inputs(prompt, len(ids)) if prompt.images else {}
                ids.append(int(whole(input_ids=torch.tensor([ids]), **more).logits[0, -1].argmax()))
                if ids[-1] in {end, tokenizer.eos_token_id}:
                    break
            expected = tokenizer.decode(ids[len(prompt.prompt_ids) :], skip_special_tokens=True).strip()
            assert answer == expected


def test_on_text_alone_the_tower_is_not_loaded_and_stays(tmp_path, monkeypatch):
    start = vision_models.save(QWEN)
    project = vision_data.write_project(tmp_path, start, n=10, with_pictures=False)
    invoke(project, "score", "config.yaml", *options("score.parity_sample=2"))
    loaded = []
    load_base = weights.load_base
    monkeypatch.setattr(weights, "load_base", lambda *given: loaded.append(given[-1]) or load_base(*given))
    for vision in ("frozen", "trained"):
        run = train(project, vision, "train.weight_decay=0.5", f"train.vision={vision}")
        assert loaded.pop() == "language" and not loaded and not stores(project)
        after = tower_of(run / "model")
        assert all(torch.equal(after[key], value) for key, value in tower_of(start).items())
    assert "no example has a picture" in said(run)


@pytest.mark.parametrize("vision", ["frozen", "trained"])
def test_a_dry_run_says_what_a_run_takes_without_the_tower(scored, vision):
    project = scored(QWEN)
    done = invoke(project, "train", "config.yaml", "--dry-run", "--json", *options(f"train.vision={vision}"))
    plan = json.loads(done.stdout)
    language = weights.load_base(Reference(vision_models.save(QWEN)), "float32", "sdpa", "cpu", "language")
    assert plan["parameters"] == plan["trained_parameters"] == sum(p.numel() for p in language.parameters())
    noted = [note for note in plan["notes"] if "the vision tower is trained" in note]
    assert len(noted) == (vision == "trained")


def test_what_is_not_supported_is_refused_with_a_sentence(scored, model, tmp_path):
    project = scored(QWEN)
    done = invoke(project, "train", "config.yaml", *options("train.vision=trained", "train.lora={}"), code=2)
    assert "trains the tower's own weights, and lora trains an adapter of the language model" in done.stderr
    other = shutil.copytree(vision_models.save(QWEN), tmp_path / "other")
    settings = (other / "processor_config.json").read_text().replace('"longest_edge": 4096', '"longest_edge": 2048')
    (other / "processor_config.json").write_text(settings)
    done = invoke(project, "train", "config.yaml", *options(f"train.model={other}", "train.run=other"), code=5)
    assert "prepares pictures in another way" in done.stderr
