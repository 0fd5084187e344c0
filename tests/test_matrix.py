"""No stale hit, no needless miss: one thing is changed at a time, and the cache must know whether it matters.

    keys       other sequences: those and no others are scored
    reference  another reference: all is scored, into a cache of its own
    numerics   the same reference computed otherwise: refused, and scored when that is asked for
    nothing    every joined value stays as it is, no token is scored, no model is loaded
    fewer      the same, and some sequences are no longer there

Whatever the effect, what is joined afterwards must be the log-probs that the model's plain forward, loaded here and
without anything of ours, gives for the tokens that are prepared then.
"""

import base64
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.numpy import load_file
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer

from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.stored.records import ScoredManifest
from tests.helpers import vision_models
from tests.helpers.project import WORDS, Done, build_model, pair

N_PAIRS = 10
LAYERS = ["q_proj", "v_proj", "down_proj"]


def conversation(i: int) -> dict[str, Any]:
    """A pair with turns that can be cut from its beginning."""
    base, first = pair(i), WORDS[i % len(WORDS)]
    turns = [("user", f"why {first} and {first}"), ("assistant", f"the {first}"), ("user", base["prompt"])]
    return {
        "prompt": [{"role": role, "content": content} for role, content in turns],
        "chosen": [{"role": "assistant", "content": base["chosen"]}],
        "rejected": [{"role": "assistant", "content": base["rejected"]}],
    }


@dataclass
class World:
    """An experiment in a temporary folder, of which a knob changes one thing."""

    root: Path
    prefcache: Callable[..., Done]
    monkeypatch: pytest.MonkeyPatch
    records: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    loads: list[Any] = field(default_factory=list)  # models loaded in this process

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def out(self) -> Path:
        return self.root / self.settings["out"]

    def arguments(self, **further: Any) -> list[str]:
        pairs = (self.settings | further).items()
        return [
            part
            for key, value in pairs
            for part in ("--set", f"{key}={yaml.safe_dump(value, default_flow_style=True)}")
        ]

    def prepare(self) -> None:
        (self.root / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in self.records))
        self.prefcache("prepare", *self.arguments())

    def score(self, code: int = 0, **further: Any) -> dict[str, Any]:
        self.loads.clear()
        done = self.prefcache("score", *self.arguments(**further), "--json", code=code)
        return json.loads(done.stdout) if code == 0 else {"said": done.stderr}

    def sequences(self) -> dict[tuple[str, str], tuple[list[int], list[int], str]]:
        """(example, answer) -> prompt ids, answer ids, key."""
        rows = Prepared(self.out / "prepared").table().to_pylist()
        return {
            (row["example_id"], side): (row["prompt_ids"], row[f"{side}_ids"], row[f"{side}_key"].hex())
            for row in rows
            for side in ("chosen", "rejected")
        }

    def keys(self) -> set[str]:
        return {key for _, _, key in self.sequences().values()}

    def joined(self) -> dict[tuple[str, str], float]:
        """What a user's own query gives for each example, as the manifest names the numerics."""
        accepted = ScoredManifest.find(self.out / "scored").accepted_numerics[0]
        asked = "select example_id, c.logp_sum as chosen, r.logp_sum as rejected from examples"
        for name, side in (("c", "chosen"), ("r", "rejected")):
            asked += f" join reference {name} on {name}.used and {name}.key = {side}_key and {name}.numerics_id = '{accepted}'"
        rows = json.loads(self.prefcache("sql", asked, self.settings["out"], "--json").stdout)
        assert len({row["example_id"] for row in rows}) == len(rows)
        return {(row["example_id"], side): row[side] for row in rows for side in ("chosen", "rejected")}

    def truth(self) -> dict[tuple[str, str], float]:
        """By Transformers' plain forward alone, one sequence at a time."""
        model = plain_model(self)
        found = {}
        for at, (prompt, answer, _) in self.sequences().items():
            ids = torch.tensor([prompt + answer])
            with torch.no_grad():
                logps = model(input_ids=ids).logits[0].double().log_softmax(-1)
            found[at] = sum(logps[n - 1, ids[0, n]].item() for n in range(len(prompt), ids.shape[1]))
        return found


def plain_model(world: World) -> Any:
    name, revision = world.settings["model"], world.settings.get("revision")
    folder = HUB[revision](world) if name == "org/tiny" else world.root / name
    dtype = world.settings.get("score.dtype", "float32")
    kernel = world.settings.get("score.attention", "sdpa")
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation=kernel)
    if adapter := world.settings.get("adapter"):
        import peft

        found = peft.PeftModel.from_pretrained(found, str(world.root / adapter))
    return found.eval()


SETTINGS = {
    "model": "model",
    "out": "runs/tiny",
    "cache": "cache",
    "prepare.data": "pairs.jsonl",
    "prepare.workers": 1,
    "prepare.held_out": 0.2,
    "prepare.max_quarantine": 1.0,
    "score.tokens_per_batch": 256,
    "score.parity_sample": 4,
}


@pytest.fixture
def world(tmp_path, prefcache, monkeypatch, model) -> World:
    shutil.copytree(model, tmp_path / "model")
    settings = dict(SETTINGS)
    made = World(tmp_path, prefcache, monkeypatch, [conversation(i) for i in range(N_PAIRS)], settings)
    real = AutoModelForCausalLM.from_pretrained

    def spied(*arguments: Any, **named: Any) -> Any:
        made.loads.append(arguments)
        return real(*arguments, **named)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spied)
    return made


# -- the knobs -------------------------------------------------------------------------------------------------------


def setting(key: str, value: Any) -> Callable[[World], None]:
    return lambda world: world.settings.update({key: value})


def settings(**values: Any) -> Callable[[World], None]:
    return lambda world: world.settings.update({key.replace("__", "."): value for key, value in values.items()})


def one_token(world: World) -> None:
    world.records[3]["chosen"][0]["content"] += " red"


def texts(prompt: str, chosen: str, rejected: str) -> Callable[[World], None]:
    def write(world: World) -> None:
        world.records = [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]
        world.settings["prepare.template"] = "none"
        world.settings["prepare.held_out"] = 0.0

    return write


def template(world: World) -> None:
    own = (world.model / "chat_template.jinja").read_text()
    (world.root / "mine.jinja").write_text("a fish sings\n" + own)
    world.settings["prepare.chat_template"] = "mine.jinja"


def tokenizer(world: World) -> None:
    path = world.model / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-20]
    path.write_text(json.dumps(content))


def other_weights(world: World) -> None:
    build_model(world.root / "trained", seed=1)
    shutil.copy(world.root / "trained/model.safetensors", world.model)


def one_bit(world: World) -> None:
    data = bytearray((world.model / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (world.model / "model.safetensors").write_bytes(data)


def in_config(**values: Any) -> Callable[[World], None]:
    def edit(world: World) -> None:
        path = world.model / "config.json"
        config = json.loads(path.read_text())
        config["rope_parameters"] |= {key: values[key] for key in values if key == "rope_theta"}
        path.write_text(json.dumps(config | {key: values[key] for key in values if key != "rope_theta"}))

    return edit


def adapter(name: str = "adapter", seed: int = 0, **keys: Any) -> Callable[[World], None]:
    def save(world: World) -> None:
        import peft

        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, target_modules=LAYERS, init_lora_weights=False, **keys)
        plain = AutoModelForCausalLM.from_pretrained(world.model)
        peft.get_peft_model(plain, config).save_pretrained(world.root / name)
        world.settings["adapter"] = name

    return save


def adapter_scale(world: World) -> None:
    path = world.root / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 2}))


def adapter_elsewhere(world: World) -> None:
    """Copied, and with what PEFT notes of the place where it was trained."""
    shutil.copytree(world.root / "adapter", world.root / "copied")
    path = world.root / "copied/adapter_config.json"
    changed = {"base_model_name_or_path": "/elsewhere", "inference_mode": False, "peft_version": "0.0.1"}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    world.settings["adapter"] = "copied"


# The branches of org/tiny, and the folder that each is a copy of.
HUB: dict[str | None, Callable[[World], Path]] = {
    "main": lambda world: world.model,
    "tuned": lambda world: world.root / "tuned",
    "again": lambda world: world.model,
}


def from_hub(world: World) -> None:
    build_model(world.root / "tuned", seed=1)
    repository = world.root / "hub/models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    for n, branch in enumerate(HUB):
        shutil.copytree(HUB[branch](world), repository / "snapshots" / (str(n) * 40))
        (repository / "refs" / str(branch)).write_text(str(n) * 40)
    world.monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(world.root / "hub"))
    world.settings |= {"model": "org/tiny", "revision": "main"}


def other_version(world: World) -> None:
    """Stands in for another engine, which has versions and a name of its own."""
    from prefcache.pipeline import identity

    real = identity.version
    world.monkeypatch.setattr(identity, "version", lambda name: "99.0" if name == "transformers" else real(name))


def two_models_in_one_folder(world: World) -> None:
    """Two files with tensors of the same names; the index selects the first."""
    build_model(world.root / "trained", seed=1)
    os.replace(world.model / "model.safetensors", world.model / "a.safetensors")
    shutil.copy(world.root / "trained/model.safetensors", world.model / "b.safetensors")
    selected("a.safetensors")(world)


def selected(file: str) -> Callable[[World], None]:
    def write(world: World) -> None:
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(world.model / file), file)}
        (world.model / "model.safetensors.index.json").write_text(json.dumps(index))

    return write


def sharded(world: World) -> None:
    plain = AutoModelForCausalLM.from_pretrained(world.model)
    (world.model / "model.safetensors").unlink()
    plain.save_pretrained(world.model, max_shard_size="20KB")
    assert len(list(world.model.glob("*.safetensors"))) > 3


def pattern_order(world: World) -> None:
    """PEFT takes the first pattern that fits, and saves them sorted."""
    path = world.root / "adapter/adapter_config.json"
    settings = json.loads(path.read_text())
    settings["alpha_pattern"] = dict(reversed(settings["alpha_pattern"].items()))
    path.write_text(json.dumps(settings))


def resaved_tokenizer(world: World) -> None:
    """By way of a loaded one, which notes where it came from and how a training loop padded with it."""
    loaded = AutoTokenizer.from_pretrained(world.model)
    loaded("x", truncation=True, max_length=9, padding="max_length")
    loaded.save_pretrained(world.model)
    assert "is_local" in (world.model / "tokenizer_config.json").read_text()


def row_order(world: World) -> None:
    random.Random(0).shuffle(world.records)


def renamed(world: World) -> None:
    # Rebuilt under another name: a link would keep the inode that its remembered hash goes by.
    shutil.copytree(world.model, world.root / "same-weights")
    world.settings["model"] = "same-weights"


def touched(world: World) -> None:
    os.utime(world.model / "model.safetensors", (0, 0))


def generation(world: World) -> None:
    (world.model / "generation_config.json").write_text('{"temperature": 0.7, "do_sample": true}')


def twice(world: World) -> None:
    world.records += world.records[:3]


def own_evaluation(world: World) -> None:
    records = [conversation(i) for i in range(N_PAIRS, N_PAIRS + 3)]
    (world.root / "own.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    world.settings["prepare.held_out_data"] = "own.jsonl"


def another_evaluated(world: World) -> None:
    with open(world.root / "own.jsonl", "a") as file:
        file.write(json.dumps(conversation(N_PAIRS + 3)) + "\n")


def nothing_yet(world: World) -> None:
    pass


@dataclass(frozen=True)
class Knob:
    name: str  # in brackets: what a well-known trainer makes of it with its own cache of reference log-probs
    change: Callable[[World], None]
    effect: str
    before: Callable[[World], None] = nothing_yet
    tolerance: float = 1e-4  # nats a token, of one kernel's rounding from another's
    scored: int | None = None  # sequences, where it is known beforehand


TIGHT = {"prepare__max_length": 48}
KNOBS = [
    Knob("a token id", one_token, "keys", scored=1),
    Knob(
        "the boundary",
        texts("why red cat", " the bird", " a dog"),
        "keys",
        texts("why red", " cat the bird", " cat a dog"),
        scored=2,
    ),
    Knob("template", template, "keys", scored=2 * N_PAIRS),
    Knob(
        "max_length of keep_start",
        settings(prepare__max_length=50),
        "keys",
        settings(prepare__too_long="keep_start"),
        scored=0,
    ),
    Knob("max_length of keep_end", settings(**TIGHT), "keys", settings(prepare__too_long="keep_end")),
    Knob(
        "keep_start to keep_end (stale elsewhere)",
        settings(prepare__too_long="keep_end"),
        "keys",
        settings(prepare__too_long="keep_start", **TIGHT),
    ),
    Knob("max_prompt_length", settings(prepare__max_prompt_length=20), "keys", settings(prepare__too_long="keep_end")),
    Knob("tokenizer", tokenizer, "keys"),
    Knob("weights", other_weights, "reference"),
    Knob("one bit of a weight file", one_bit, "reference"),
    Knob("weight_map of the index", selected("b.safetensors"), "reference", two_models_in_one_folder),
    Knob(
        "order of an adapter's patterns",
        pattern_order,
        "reference",
        adapter(alpha_pattern={"layers.0.self_attn.q_proj": 64, "q_proj": 2}),
    ),
    Knob("rope_theta (stale elsewhere)", in_config(rope_theta=50.0), "reference"),
    Knob("epsilon of the norms", in_config(rms_norm_eps=0.1), "reference"),
    Knob("activation", in_config(hidden_act="gelu"), "reference"),
    Knob("adapter", adapter(), "reference"),
    Knob("adapter weights", adapter(seed=1), "reference", adapter()),
    Knob("adapter scale", adapter_scale, "reference", adapter()),
    Knob("revision", setting("revision", "tuned"), "reference", from_hub),
    Knob("dtype", setting("score.dtype", "bfloat16"), "numerics", tolerance=0.3),
    Knob("what the head multiplies", setting("score.head_dtype", "bfloat16"), "numerics", tolerance=0.3),
    Knob("attention kernel", setting("score.attention", "eager"), "numerics"),
    Knob("engine", other_version, "numerics"),
    Knob("loss", setting("train.loss", "ipo"), "nothing"),
    Knob("beta", setting("train.beta", 0.5), "nothing"),
    Knob("ld_alpha (stale elsewhere)", setting("train.loss_args", {"ld_alpha": 0.5}), "nothing"),
    Knob("learning rate (scored again elsewhere)", setting("train.learning_rate", 1e-3), "nothing"),
    Knob("batch size", setting("train.batch_size", 4), "nothing"),
    Knob("seed", setting("train.seed", 7), "nothing"),
    Knob("epochs", setting("train.epochs", 3), "nothing"),
    Knob("precision of the policy", setting("train.precision", "bf16"), "nothing"),
    Knob("weights of the policy", setting("train.weights", "bfloat16"), "nothing"),
    Knob("name of the run", setting("train.run", "second"), "nothing"),
    Knob("row order", row_order, "nothing"),
    Knob("rows that occur twice", twice, "nothing"),
    Knob("a record of the evaluation data", another_evaluated, "keys", own_evaluation, scored=2),
    Knob(
        "the name of the evaluation data",
        settings(prepare__held_out_data={"other": "own.jsonl"}),
        "nothing",
        own_evaluation,
    ),
    Knob("max_records", setting("prepare.max_records", 4), "fewer"),
    Knob("held-out share", setting("prepare.held_out", 0.5), "nothing"),
    Knob("max_length that cuts nothing", setting("prepare.max_length", 400), "nothing"),
    Knob("which tokens count: all", setting("prepare.train_on", "all"), "nothing"),
    Knob("which tokens count: those of the last turn", setting("prepare.train_on", "last_turn"), "nothing"),
    Knob("output folder", setting("out", "runs/other"), "nothing"),
    Knob("tokens_per_batch", setting("score.tokens_per_batch", 100), "nothing"),
    Knob("tokens_per_shard", setting("score.tokens_per_shard", 300), "nothing"),
    Knob("rows layout", setting("score.rows", "padded"), "nothing"),
    Knob("actors of Ray", setting("score.ray.actors", 2), "nothing"),
    Knob("parity_sample", setting("score.parity_sample", 2), "nothing"),
    Knob("the model folder's name", renamed, "nothing"),
    Knob("time of the weight file", touched, "nothing"),
    Knob("generation_config.json", generation, "nothing"),
    Knob("dtype that the config notes", in_config(dtype="bfloat16"), "nothing"),
    Knob("in how many files the weights lie", sharded, "nothing"),
    Knob("ids of the ends", in_config(eos_token_id=5, bos_token_id=6), "nothing"),
    Knob("name of the class", in_config(architectures=["LlamaModel"]), "nothing"),
    Knob("tokenizer loaded and saved", resaved_tokenizer, "nothing"),
    Knob("adapter of another place", adapter_elsewhere, "nothing", adapter()),
    Knob("another name of the same revision", setting("revision", "again"), "nothing", from_hub),
]


def check_close(found: dict, expected: dict, world: World, tolerance: float) -> None:
    n_tokens = {at: len(answer) for at, (_, answer, _) in world.sequences().items()}
    assert found.keys() == expected.keys()
    worst = max(abs(found[at] - expected[at]) / n_tokens[at] for at in expected)
    assert worst < tolerance, worst


# Settings that nothing of a cache is made from: of these, a few are enough each time.
RARELY = {
    *("beta", "batch size", "seed", "epochs", "precision of the policy", "weights of the policy", "name of the run"),
    *("held-out share", "max_length that cuts nothing", "tokens_per_shard", "parity_sample", "generation_config.json"),
    *("time of the weight file", "name of the class", "rows that occur twice", "another name of the same revision"),
    *("epsilon of the norms", "activation", "adapter weights", "attention kernel"),
}
assert {knob.name for knob in KNOBS} >= RARELY


@pytest.mark.parametrize(
    "knob",
    [pytest.param(each, id=each.name, marks=[pytest.mark.slow] if each.name in RARELY else []) for each in KNOBS],
)
def test_a_change_makes_neither_a_stale_hit_nor_a_needless_miss(world, knob):
    check_change(world, knob)


def check_change(world: World, knob: Knob) -> None:
    knob.before(world)
    world.prepare()
    first, old, old_keys = world.score(), world.joined(), world.keys()
    check_close(old, world.truth(), world, 1e-4)
    knob.change(world)
    world.prepare()
    if knob.effect == "numerics":
        assert "score.rescore=true" in world.score(code=5)["said"] and not world.loads
    second = world.score(**({"score.rescore": True} if knob.effect == "numerics" else {}))

    if knob.effect in ("nothing", "fewer"):
        assert (second["tokens"], second["scored"], world.loads) == (0, 0, [])
        now = world.joined()
        assert {at: now[at] for at in now.keys() & old.keys()} == {at: old[at] for at in now.keys() & old.keys()}
        assert (
            world.keys() < old_keys if knob.effect == "fewer" else world.keys() == old_keys and old.keys() <= now.keys()
        )
        check_close(now, world.truth(), world, 1e-4)
        return
    assert (second["cache"] != first["cache"]) == (knob.effect == "reference")
    n_new = len(world.keys() - old_keys if knob.effect == "keys" else world.keys())
    assert n_new > 0 and knob.scored in (None, second["scored"])
    # What keep_start cuts has the values that its tokens had before.
    assert second["scored"] == n_new or (knob.scored == 0 and not world.loads)
    found = world.joined()
    check_close(found, world.truth(), world, knob.tolerance)
    world.score(cache="fresh")
    check_close(found, world.joined(), world, 1e-5 if knob.effect != "numerics" else knob.tolerance)


# -- pictures --------------------------------------------------------------------------------------------------------


class SeeingWorld(World):
    """Every prompt has a picture, in a file of its own."""

    def draw(self, i: int) -> Image.Image:
        return vision_models.picture(20 + i, 16 + i % 3, seed=i)

    def truth(self) -> dict[tuple[str, str], float]:
        """By Transformers' own model and image processor."""
        model = vision_models.load(self.model)
        process = AutoImageProcessor.from_pretrained(self.model, backend="pil")
        found = {}
        for row in Prepared(self.out / "prepared").table().to_pylist():
            (value,) = self.records[row["line"] - 1]["images"]
            file = io.BytesIO(base64.b64decode(value.partition(",")[2])) if value[:5] == "data:" else self.root / value
            seen = process(images=[Image.open(file).convert("RGB")], return_tensors="pt")
            for side in ("chosen", "rejected"):
                prompt, ids = row["prompt_ids"], torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
                is_image = (ids == model.config.image_token_id).int()
                with torch.no_grad():
                    logps = model(input_ids=ids, mm_token_type_ids=is_image, **seen).logits[0].double().log_softmax(-1)
                found[row["example_id"], side] = sum(
                    logps[n - 1, ids[0, n]].item() for n in range(len(prompt), ids.shape[1])
                )
        return found


@pytest.fixture
def seeing(tmp_path, prefcache, monkeypatch) -> SeeingWorld:
    shutil.copytree(vision_models.save("qwen2.5-vl"), tmp_path / "model")
    settings = dict(SETTINGS)
    records = [conversation(i) | {"images": [f"pics/{i}.png"]} for i in range(N_PAIRS)]
    made = SeeingWorld(tmp_path, prefcache, monkeypatch, records, settings)
    (tmp_path / "pics").mkdir()
    for i in range(N_PAIRS):
        made.draw(i).save(tmp_path / f"pics/{i}.png")
    return made


def one_pixel(world: SeeingWorld) -> None:
    image = world.draw(3)
    red, green, blue = image.getpixel((5, 5))
    image.putpixel((5, 5), (red ^ 255, green, blue))
    image.save(world.root / "pics/3.png")


def in_processor(**values: Any) -> Callable[[World], None]:
    def edit(world: World) -> None:
        path = world.model / "processor_config.json"
        content = json.loads(path.read_text())
        content["image_processor"] |= values
        path.write_text(json.dumps(content))

    return edit


def moved_pictures(world: World) -> None:
    shutil.move(world.root / "pics", world.root / "elsewhere")
    for each in world.records:
        each["images"] = [each["images"][0].replace("pics/", "elsewhere/")]


def renamed_pictures(world: World) -> None:
    for i, each in enumerate(world.records):
        os.replace(world.root / f"pics/{i}.png", world.root / f"pics/picture-{i}.png")
        each["images"] = [f"pics/picture-{i}.png"]


def other_container(world: World) -> None:
    for i, each in enumerate(world.records):
        Image.open(world.root / f"pics/{i}.png").save(world.root / f"pics/{i}.bmp")
        each["images"] = [f"pics/{i}.bmp"]


def in_another_record(world: World) -> None:
    """From the last record's line on, and from another file."""
    shutil.copy(world.root / "pics/3.png", world.root / "pics/copied.png")
    world.records.append(world.records[3] | {"images": ["pics/copied.png"]})


def data_addresses(world: World) -> None:
    for i, each in enumerate(world.records):
        text = base64.b64encode((world.root / f"pics/{i}.png").read_bytes()).decode()
        each["images"] = [f"data:image/png;base64,{text}"]


def touched_pictures(world: World) -> None:
    for path in (world.root / "pics").iterdir():
        os.utime(path, (0, 0))


PICTURE_KNOBS = [
    Knob("a pixel of a picture", one_pixel, "keys", scored=2),
    Knob(
        "resolution of the processor",
        in_processor(size={"shortest_edge": 24 * 24, "longest_edge": 48 * 48}),
        "keys",
        scored=2 * N_PAIRS,
    ),
    Knob("normalisation of the processor", in_processor(image_mean=[0.1, 0.2, 0.3]), "keys", scored=2 * N_PAIRS),
    Knob("the folder of the pictures", moved_pictures, "nothing"),
    Knob("the names of the pictures", renamed_pictures, "nothing"),
    Knob("another container of the same pixels", other_container, "nothing"),
    Knob("the same picture in another record", in_another_record, "nothing"),
    Knob("data addresses instead of files", data_addresses, "nothing"),
    Knob("times of the picture files", touched_pictures, "nothing"),
]


@pytest.mark.parametrize("knob", [pytest.param(each, id=each.name) for each in PICTURE_KNOBS])
def test_a_change_of_pictures_makes_neither_a_stale_hit_nor_a_needless_miss(seeing, knob):
    check_change(seeing, knob)


# -- beyond one change -----------------------------------------------------------------------------------------------


def test_the_boundary_is_part_of_the_key_though_the_tokens_are_the_same(world):
    knob = next(knob for knob in KNOBS if knob.name == "the boundary")
    whole = []
    for write in (knob.before, knob.change):
        write(world)
        world.prepare()
        whole.append({tuple(prompt + answer): key for prompt, answer, key in world.sequences().values()})
    assert whole[0].keys() == whole[1].keys() and not set(whole[0].values()) & set(whole[1].values())


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantized_weights_are_a_reference_of_their_own(world, quantization):
    pytest.importorskip("bitsandbytes")
    world.prepare()
    plain, exact = world.score(), world.joined()
    world.settings["score.quantization"] = quantization
    quantized = world.score()
    assert quantized["cache"] != plain["cache"] and quantized["scored"] == plain["scored"]
    assert world.joined() != exact and world.score()["tokens"] == 0


def test_a_tokenizer_changed_after_preparing_is_refused(world):
    world.prepare()
    tokenizer(world)
    assert "another tokenizer" in world.score(code=5)["said"] and not world.loads


SWEEP = [
    ("sigmoid", 0.1, 1e-6, 0, 8),
    ("sigmoid", 0.5, 1e-6, 0, 8),
    ("ipo", 0.1, 1e-6, 0, 8),
    ("ipo", 0.1, 1e-5, 0, 8),
    ("hinge", 0.1, 1e-5, 0, 4),
    ("hinge", 0.2, 1e-5, 1, 4),
    ("sigmoid", 0.2, 3e-5, 2, 2),
    ("ipo", 1.0, 3e-5, 3, 16),
]


def test_a_sweep_of_eight_configurations_costs_one_reference_pass(world):
    world.prepare()
    one_pass = sum(len(prompt) + len(answer) for prompt, answer, _ in world.sequences().values())
    assert len(world.keys()) == 2 * N_PAIRS
    tokens, loads = [], []
    for n, (loss, beta, learning_rate, seed, batch_size) in enumerate(SWEEP):
        train = {"loss": loss, "beta": beta, "learning_rate": learning_rate, "seed": seed, "batch_size": batch_size}
        result = world.score(**{f"train.{key}": value for key, value in train.items()}, **{"train.run": f"run{n}"})
        tokens.append(result["tokens"])
        loads.append(len(world.loads))
    assert sum(tokens) == tokens[0] == one_pass
    assert loads[0] > 0 and not any(loads[1:])


def test_other_tokens_that_count_are_prepared_and_trained_anew_and_nothing_is_scored(world):
    run, ids = {"train.samples": 0, "train.batch_size": 4}, set()
    for n, value in enumerate(("assistant", "all", "last_turn")):
        world.settings["prepare.train_on"] = value
        world.prepare()
        ids.add(Prepared(world.out / "prepared").id)
        assert len(ids) == n + 1
        if n:
            refused = world.prefcache("train", *world.arguments(**run), code=5).stderr
            assert "belongs to other data" in refused
        scored = world.score()
        assert (scored["tokens"] == 0) == bool(n) and bool(world.loads) == (n == 0)
        trained = json.loads(world.prefcache("train", *world.arguments(**run), "--json").stdout)
        assert trained["changed"] is True
        assert json.loads(world.prefcache("train", *world.arguments(**run), "--json").stdout)["changed"] is False
    assert len(list((world.out).glob("trained*"))) == 3


# -- training against such a reference -------------------------------------------------------------------------------


def test_a_policy_is_trained_against_a_reference_with_an_adapter(world):
    adapter()(world)
    world.prepare()
    world.score()
    for start in ({}, {"train.model": "adapter"}):
        assert "starts from a whole model" in world.prefcache("train", *world.arguments(**start), code=2).stderr
    run = {"train.model": "model", "train.samples": 0, "train.batch_size": 4}
    result = json.loads(world.prefcache("train", *world.arguments(**run), "--json").stdout)
    joined = world.joined()
    # The policy starts without the adapter, the reference has it: the margin at the start is their difference.
    world.settings.pop("adapter")
    without = world.truth()
    trained = Prepared(world.out / "prepared").table("train").to_pylist()
    margins = [
        sum(
            sign * (without[at] - joined[at])
            for sign, at in ((1, (row["example_id"], "chosen")), (-1, (row["example_id"], "rejected")))
        )
        for row in trained
    ]
    assert result["start"]["rewards/margins"] == pytest.approx(0.1 * sum(margins) / len(margins), abs=1e-3)
