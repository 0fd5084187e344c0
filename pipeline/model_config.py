"""The keys that prefcache reads of a model's config.json, typed: others wrote the file, so it may hold anything.

Unknown keys are left to Transformers. A key that is read here and has an invalid value is an error before any model loads.
"""

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from prefcache.pipeline.errors import UsageError, first_complaint

FILE, ADAPTER_FILE = "config.json", "adapter_config.json"
_REMEDY = "Expected a folder as save_pretrained writes it."

T = TypeVar("T", bound="_Part")


def _none_if_off(value: Any) -> Any:
    """Read null, 0 and -1 alike: each is how some configs write that there is no limit."""
    return None if not value or (isinstance(value, int) and value < 0) else value


Length = Annotated[Annotated[int, Field(ge=1, le=1 << 62)] | None, BeforeValidator(_none_if_off)]


class _Part(BaseModel):
    # Without `strict`: 2048.0 is as good a length as 2048.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Rope(_Part):
    """The rope settings of all layers, or of one type of layer."""

    rope_type: str | None = None
    type: str | None = None
    original_max_position_embeddings: Length = None

    @property
    def kind(self) -> str | None:
        return self.rope_type or self.type


class ModelConfig(_Part):
    """The config of a model that reads text, or of the part of it that does."""

    model_type: str | None = None
    vocab_size: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    max_position_embeddings: Length = None
    n_positions: Length = None
    n_ctx: Length = None
    max_seq_len: Length = None
    original_max_position_embeddings: Length = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    attn_logit_softcapping: float | None = None
    dtype: str | dict[str, str] | None = None
    torch_dtype: str | dict[str, str] | None = None
    quantization_config: dict[str, Any] | None = None
    text_config: "ModelConfig | None" = None

    @property
    def text_model(self) -> "ModelConfig":
        """The part whose log-probs are computed; for a model that also sees images, its language model."""
        return self.text_config or self

    @property
    def lengths(self) -> list[int]:
        """The maximum length of a sequence, under each of its names."""
        found = (self.max_position_embeddings, self.n_positions, self.n_ctx, self.max_seq_len)
        return [length for length in found if length]

    @property
    def ropes(self) -> list[Rope]:
        """One for all layers, or one for each type of layer."""
        settings = self.rope_parameters or self.rope_scaling or {}
        nested = [value for value in settings.values() if isinstance(value, dict)]
        return [Rope.model_validate(each) for each in nested or [settings]]

    @property
    def saved_dtype(self) -> str:
        """The dtype in which the weights were saved."""
        found = self.dtype or self.torch_dtype
        named = next(iter(found.values()), "") if isinstance(found, dict) else found
        return (named or "float32").removeprefix("torch.")


class AdapterConfig(_Part):
    """The config of an adapter, as PEFT saves it."""

    peft_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    alora_invocation_tokens: list[Any] | None = None
    megatron_config: Any = None


def read(folder: Path) -> ModelConfig:
    """Read the config of a model's folder; UsageError with what is wrong with it."""
    config = _parse(folder / FILE, ModelConfig)
    try:
        _ = config.text_model.ropes
    except ValidationError as error:
        raise UsageError(f"{folder / FILE}: {first_complaint(error, 'rope_parameters')}. {_REMEDY}") from None
    return config


def read_adapter(folder: Path) -> AdapterConfig:
    """Read the config of an adapter's folder; UsageError with what is wrong with it."""
    return _parse(folder / ADAPTER_FILE, AdapterConfig)


def read_object(path: Path) -> dict[str, Any]:
    """Read a whole JSON file that others wrote and that must hold an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise UsageError(f"{path} holds {half}, half of a character, which is not valid text. {_REMEDY}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {' '.join(str(error).split())[:200]}. {_REMEDY}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds {type(content).__name__}, expected an object. {_REMEDY}")
    return content


def _parse(path: Path, kind: type[T]) -> T:
    try:
        return kind.model_validate(read_object(path))
    except (ValidationError, RecursionError) as error:
        reason = first_complaint(error) if isinstance(error, ValidationError) else "is nested too deeply"
        raise UsageError(f"{path}: {reason}. {_REMEDY}") from None
