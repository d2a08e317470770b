"""Chat templates for tests."""

from __future__ import annotations

# GEMMA3: writes conversations as Gemma 3's own template does: what the system says is the beginning of
# the user's first turn, and a content may be a list of parts.
GEMMA3 = """\
{{ bos_token }}
{%- set turns, said = messages, "" -%}
{%- if messages[0]["role"] == "system" -%}
    {%- set turns = messages[1:] -%}
    {%- set content = messages[0]["content"] -%}
    {%- set said = (content if content is string else content[0]["text"]) + "\\n\\n" -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if (turn["role"] == "user") != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("roles must alternate") }}
    {%- endif -%}
    {{ "<start_of_turn>" + ("model" if turn["role"] == "assistant" else turn["role"]) + "\\n" + (said if loop.first else "") }}
    {%- if turn["content"] is string -%}
        {{ turn["content"] | trim }}
    {%- elif turn["content"] is iterable -%}
        {%- for part in turn["content"] -%}
            {{ "<start_of_image>" if part["type"] == "image" else part["text"] | trim }}
        {%- endfor -%}
    {%- endif -%}
    {{ "<end_of_turn>\\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ "<start_of_turn>model\\n" }}
{%- endif -%}
"""
