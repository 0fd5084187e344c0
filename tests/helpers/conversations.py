"""Turns of conversations with tools, and a template in the style of those that name a function in its result's header."""

from typing import Any

Message = dict[str, Any]

TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "Add numbers.", "parameters": {"type": "object", "properties": {}}},
    }
]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def tool(text: str, **more: Any) -> Message:
    return {"role": "tool", "content": text, **more}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    """The key of a turn that calls a function."""
    return {"tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}


# The last turn of a conversation ends with another token than earlier ones, and a call with a third.
HARMONY_CHAT = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- if message.tool_calls %}
{%- set call = message.tool_calls[0].function %}
{%- if message.content %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.content + '<|end|>' }}{%- endif %}
{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' + (call.arguments | tojson) + '<|call|>' }}
{%- elif loop.last and not add_generation_prompt %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}
{%- else %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
{%- endif %}
{%- elif message.role == 'tool' %}
{%- if messages[loop.index0 - 1].tool_calls is not defined %}{{ raise_exception('no call') }}{%- endif %}
{{- '<|start|>functions.' + messages[loop.index0 - 1].tool_calls[0].function.name + ' to=assistant<|channel|>commentary<|message|>' + (message.content | tojson) + '<|end|>' }}
{%- else %}
{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""
