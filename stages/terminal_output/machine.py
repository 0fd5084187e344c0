"""What `doctor` found on this machine."""

from rich.text import Text

from prefcache import command_results
from prefcache.pipeline.visible_text import count, visible
from prefcache.terminal_output.console import open_console, wrap

_STATES = {"ok": ("ok", "green"), "absent": ("--", "dim"), "problem": ("!!", "bold red")}


def print_doctor(result: command_results.DoctorResult) -> None:
    console, area = open_console(), None
    for finding in result.findings:
        if finding.area != area:
            area = finding.area
            console.print(Text(area, style="bold"))
        sign, style = _STATES[finding.state]
        text = Text(wrap(f"  {sign} {finding.what}", indent=5))
        text.stylize(style, 0, 5)
        console.print(text, soft_wrap=True)
        if finding.remedy:
            console.print(Text(f"     {visible(finding.remedy)}", style="cyan"), soft_wrap=True)
    if result.why is not None:
        console.print(Text("up to date", style="bold"))
    for why in result.why or ():
        sign, style = _STATES["ok" if why.fresh else "absent"]
        text = Text(wrap(f"  {sign} {why.what}: {why.sentence}", indent=5))
        text.stylize(style, 0, 5)
        console.print(text, soft_wrap=True)
    n = result.problems
    console.print(f"\n{count(n, 'problem')}" if n else "\nno problems", style="bold red" if n else "bold green")
