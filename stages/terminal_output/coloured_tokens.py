"""Tokens in colours: `preview` shows how records become tokens, `show` what the models think of each token."""

from collections.abc import Sequence
from itertools import groupby

from rich.text import Text

from prefcache import command_results
from prefcache.pipeline.visible_text import visible, visible_tokens
from prefcache.terminal_output.console import open_console, print_text

_CUT_STYLE = "strike red"


# Adjacent tokens alternate between two colours.
_TOKEN_COLOURS = {"prompt": ("blue", "cyan"), "rejected": ("yellow", "bright_yellow")}


_ANSWER_COLOURS = ("green", "bright_green")


def print_preview(result: command_results.PreviewResult, ids: bool) -> None:
    """Print tokens in alternating colours, with special and cut ones in colours of their own, and dim what does not count."""
    console = open_console()
    for example in result.examples:
        print_text(console, Text(visible(f"{example.source}, line {example.line}"), style="bold"))
        if isinstance(example, command_results.PreviewUnusable):
            reason = f"{example.reason}: {example.detail}" if example.detail else example.reason
            print_text(console, Text(visible(f"  to quarantine: {reason}\n"), style="red"))
            continue
        facts = [f"boundary {example.boundary}"]
        facts += ["plain text as one turn of the chat template (prepare.template)"] if example.plain_text else []
        facts += [f"label {str(example.label).lower()}"] if example.label is not None else []
        facts += [f"{example.cut_prompt:,} tokens of its oldest turns left out"] if example.cut_prompt else []
        print_text(console, Text("  " + ", ".join(facts), style="dim"))
        for part in example.parts:
            facts = [f"{part.n_tokens:,} tokens"]
            facts += (
                [f"{part.n_counted:,} of them count"]
                if part.name != "prompt" and part.n_counted < part.n_tokens
                else []
            )
            facts += [f"{part.n_cut:,} more cut"] if part.n_cut else []
            print_text(console, Text(f"  {part.name} ({', '.join(facts)})", style="bold"))
            if part.cut_turns:
                print_text(console, Text(visible(part.cut_turns), style=_CUT_STYLE))
            print_text(console, _preview_text(part))
            if ids:
                print_text(
                    console, Text(" ".join(str(token.id) for token in part.tokens if not token.cut), style="dim")
                )
        console.print()


def _preview_text(part: command_results.PreviewPart) -> Text:
    text = Text()
    colours = _TOKEN_COLOURS.get(part.name, _ANSWER_COLOURS)
    pieces = visible_tokens([token.text for token in part.tokens])
    for _, run in groupby(enumerate(part.tokens), key=lambda item: _run_key(*item)):
        (n, token), *others = run
        piece = pieces[n] + (f"[{len(others) + 1:,} times]" if others else "")
        if n == part.n_tokens:
            text.append("[cut here]", style="bold red")
        style = _CUT_STYLE if token.cut else "reverse magenta" if token.special else colours[n % 2]
        style = style if token.counts or token.cut or part.name == "prompt" else f"dim {style}"
        text.append(piece, style=style)
    return text


def _run_key(n: int, token: command_results.PreviewToken) -> object:
    """Return what equal special tokens in a row share, as those have that stand for an image."""
    return (token.id, token.cut, token.counts) if token.special else n


# What colours a token: the first of these that every token has. With one model only, how surprised that model was.
_COLOURED_BY = {
    "log_ratio": "green: the policy finds the token likelier than the reference does; red: less likely",
    "reference": "red: the reference did not expect the token",
    "policy": "red: the policy does not expect the token",
}


_N_LISTED = 5


def print_show(result: command_results.ShowResult) -> None:
    """Colour the tokens, and list those that differ most: pipes and some readers lack colours."""
    console = open_console()
    label = "" if result.label is None else f", label {str(result.label).lower()}"
    where = f"{result.example_id}, {result.split}: {result.source}, line {result.line}{label}"
    print_text(console, Text(visible(where), style="bold"))
    print_text(console, Text(f"{visible(result.prompt)}\n", style="dim"))
    tokens = [token for answer in result.answers for token in answer.tokens if token.counts]
    name = next((name for name in _COLOURED_BY if all(getattr(token, name) is not None for token in tokens)), None)
    full = max((abs(getattr(token, name)) for token in tokens), default=0.0) if name else 0.0
    for answer in result.answers:
        sums = {"policy": answer.policy_sum, "reference": answer.reference_sum, "log-ratio": answer.log_ratio_sum}
        facts = ", ".join(f"{label} {value:.3f}" for label, value in sums.items() if value is not None)
        count = f", of which {answer.n_counted:,} count" if answer.n_counted < answer.n_tokens else ""
        title = f"{answer.name} ({answer.n_tokens:,} tokens{count}{f': {facts}' if facts else ''})"
        print_text(console, Text(title, style="bold"))
        values = [getattr(token, name) if name and token.counts else 0.0 for token in answer.tokens]
        print_text(console, _coloured_text(answer.tokens, values, full))
        if name:
            form = "{:+.2f}" if name == "log_ratio" else "{:.2f}"
            counted = [pair for pair in zip(answer.tokens, values, strict=True) if pair[0].counts]
            most = sorted(counted, key=lambda pair: -abs(pair[1]))[:_N_LISTED]
            listed = ", ".join(f"{visible(repr(token.text))} {form.format(value)}" for token, value in most)
            print_text(console, Text(f"most: {listed}", style="dim"))
        console.print()
    legend = [f"{_COLOURED_BY[name]}; full colour at {full:.2f} nats."] if name else []
    legend += [] if result.scored else ["The reference has not been scored (prefcache score CONFIG)."]
    legend += ["No run of that name has a model yet (prefcache train CONFIG)."] if result.run is None else []
    for line in legend:
        print_text(console, Text(line, style="dim"))


def _coloured_text(tokens: Sequence[command_results.ShowToken], values: Sequence[float], full: float) -> Text:
    """Print black on a coloured ground, which is readable on a dark and on a light terminal."""
    text = Text()
    for token, piece, value in zip(tokens, visible_tokens([token.text for token in tokens]), values, strict=True):
        strength = min(abs(value) / full, 1.0) if full else 0.0
        pale, strong = round(235 - 125 * strength), round(255 - 50 * strength)
        ground = f"rgb({pale},{strong},{pale})" if value > 0 else f"rgb({strong},{pale},{pale})"
        text.append(piece, style=f"black on {ground}" if strength > 0.02 else "" if token.counts else "dim")
    return text
