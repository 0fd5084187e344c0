"""The text that stands for a picture: the model's processor puts it in the place of the chat template's placeholder.

The ids are those of the processor itself: the first prompts of each part are compared with what it makes of the whole.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.image_processor import ImageProcessor, Replacement
from prefcache.pipeline.images import Picture
from prefcache.pipeline.preparing.chat_template import ChatTemplate
from prefcache.pipeline.preparing.encoder import ExampleText, ExampleTokens
from prefcache.pipeline.preparing.example import IMAGE_MARK, Example, Turns, Unusable
from prefcache.pipeline.preparing.token_ids import Ids

COMPARED = 8  # prompts of a part
_REFUSALS = (ArithmeticError, LookupError, ValueError)  # what processors raise, of very thin pictures for example


class ImageText:
    """Expands placeholders. Nothing else in an example may become a token that stands for a picture."""

    def __init__(self, processor: ImageProcessor, encode: Callable[[Sequence[str]], list[Ids]]) -> None:
        self.processor, self._encode = processor, encode
        self._n_compared = 0

    def start_part(self) -> None:
        """Compare anew, so that the prompts compared depend on the part alone."""
        self._n_compared = 0

    def refuse_placeholders(self, example: Example) -> None:
        """Raise Unusable if the data itself has the text that stands for a picture."""
        placeholder = self.processor.placeholder
        for text in _texts((example.prompt, *example.answers)):
            if placeholder in text:
                raise Unusable("image placeholder in the text", placeholder)

    def expand(self, text: ExampleText, images: Sequence[Picture]) -> ExampleText:
        """Return the text as the model's processor writes it out."""
        if not images:
            return text
        before, *rest = text.prompt.split(self.processor.placeholder)
        if len(rest) != len(images):
            what = "placeholders that the chat template writes, against images of the prompt"
            raise Unusable("template prints other images", what, n_found=len(rest), n_limit=len(images))
        replacements = self._replacements(images)
        prompt = before + "".join(new.text + piece for new, piece in zip(replacements, rest, strict=True))
        if self._n_compared < COMPARED:
            self._n_compared += 1
            self._compare(text.prompt, prompt, images)
        return text._replace(prompt=prompt)

    def check_ids(self, tokens: ExampleTokens, images: Sequence[Picture]) -> None:
        """Raise Unusable unless the tokens of pictures are those of the example's own, all in the prompt."""
        expected = sum(each.n_tokens for each in self._replacements(images))
        for n, ids in ((expected, tokens.prompt), *((0, ids) for ids in tokens.answers)):
            if (found := self.processor.count_image_tokens(np.frombuffer(ids, np.int32))) != n:
                what = "tokens that stand for images, against those of its images"
                raise Unusable("image placeholder in the text", what, n_found=found, n_limit=n)

    def _replacements(self, images: Sequence[Picture]) -> Iterator[Replacement]:
        for image in images:
            try:
                yield self.processor.replace(image, one_of_several=len(images) > 1)
            except _REFUSALS as error:
                raise Unusable("processor refuses the image", f"{type(error).__name__}: {error}") from None

    def _compare(self, prompt: str, expanded: str, images: Sequence[Picture]) -> None:
        expected = self.processor.encode(prompt, [image.pixels for image in images])
        found = self._encode([expanded])[0].tolist()
        if found != expected:
            raise IntegrityError(
                f"The processor of this model makes {len(expected)} ids of a prompt with {len(images)} images, and prepare "
                f"{len(found)} or others: they would not be what the model is used with. Prepare with another model."
            )


def count_placeholders(template: ChatTemplate, placeholder: str) -> int:
    """Count the placeholders that a template prints for a user's picture."""
    with ChatTemplate.limits():
        try:
            text = template.render([{"role": "user", "content": f"{IMAGE_MARK}x"}], add_generation_prompt=True)
        except Unusable:
            return 0
    return text.count(placeholder)


def _texts(conversations: Iterable[Turns]) -> Iterator[str]:
    for turns in conversations:
        if isinstance(turns, str):
            yield turns
            continue
        for turn in turns:
            # A template may write any of a message's texts.
            yield from (value for value in turn.values() if isinstance(value, str))
            if calls := turn.get("tool_calls"):
                yield str(calls)
