"""A model's tokenizer, as Transformers loads it; the folder's own code is never run.

Its chat template is that of the model's processor, if the folder has one: that is the one which prints images.
"""

import json
from pathlib import Path
from typing import Any

from prefcache.pipeline.errors import UsageError, first_line

PROCESSOR_CONFIGS = ("processor_config.json", "preprocessor_config.json")  # a model that sees images has one of them


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # it warns about every text longer than the model's limit
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer.chat_template = _processor_template(folder) or tokenizer.chat_template
        return tokenizer
    except Exception as error:  # The loader raises whatever its parts raise.
        refuse_own_code(error, folder)
        raise UsageError(
            f"{folder} has no tokenizer that loads ({first_line(error)}). Expected tokenizer.json next to the model."
        ) from None


def _processor_template(folder: Path) -> str | None:
    """Return the template that a processor has in a file of its own, and which a tokenizer does not load."""
    is_with_images = any((folder / name).exists() for name in PROCESSOR_CONFIGS)
    names = ("processor_config.json", *(() if (folder / "chat_template.jinja").exists() else ("chat_template.json",)))
    for path in (folder / name for name in names if is_with_images):
        settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if isinstance(settings, dict) and isinstance(template := settings.get("chat_template"), str):
            return template
    return None


def refuse_own_code(error: Exception, folder: Path) -> None:
    """Explain an error that Transformers raised because it would have to run the folder's code."""
    if "trust_remote_code" in str(error):
        raise needs_own_code(folder) from None


def needs_own_code(folder: Path) -> UsageError:
    return UsageError(
        f"{folder} needs Python code of its own (auto_map in its config), which prefcache never runs: Transformers has no "
        "class for it. Name a model that Transformers knows, or convert this one to such a class."
    )
