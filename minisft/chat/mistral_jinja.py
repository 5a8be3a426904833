"""The templates of `mistral` in Jinja, for plain transformers: `tokenizer.apply_chat_template` gives training's ids."""

from __future__ import annotations

_HEAD = """\
{{- bos_token -}}
{%- set ns = namespace(system='', expect='user', users=0, user=0) -%}
{%- for m in messages -%}
{%- if m['role'] == 'system' -%}
{%- if m['content'] -%}{%- set ns.system = ns.system + m['content'] + '\\n\\n' -%}{%- endif -%}
{%- else -%}
{%- if m['role'] != ns.expect -%}
{{- raise_exception('user and assistant must take turns, and a user begins') -}}
{%- endif -%}
{%- if m['role'] == 'user' -%}{%- set ns.users = ns.users + 1 -%}{%- set ns.expect = 'assistant' -%}
{%- else -%}{%- set ns.expect = 'user' -%}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
"""
_TAIL = """
{%- endfor -%}
"""

# `place` is the number of the question that takes the system prompt.
_V1 = """\
{%- if m['role'] == 'user' -%}
{%- set ns.user = ns.user + 1 -%}
{{- '[INST] ' + (ns.system if ns.user == 1 else '') + m['content'] + ' [/INST]' -}}
{%- elif m['role'] == 'assistant' -%}
{{- ' ' + m['content'] + eos_token -}}
{%- endif -%}"""
_V3 = """\
{%- if m['role'] == 'user' -%}
{%- set ns.user = ns.user + 1 -%}
{{- '[INST]' + (ns.system if ns.user == ns.users else '') + m['content'] + '[/INST]' -}}
{%- elif m['role'] == 'assistant' -%}
{{- m['content'].rstrip(' ') + eos_token -}}
{%- endif -%}"""
_V7 = """\
{%- if m['role'] == 'system' -%}
{{- '[SYSTEM_PROMPT]' + m['content'] + '[/SYSTEM_PROMPT]' -}}
{%- elif m['role'] == 'user' -%}
{{- '[INST]' + m['content'] + '[/INST]' -}}
{%- else -%}
{{- m['content'].rstrip(' ') + eos_token -}}
{%- endif -%}"""


def jinja(version: str) -> str:
    """The chat template of a version; `[INST]` and the like are control tokens but for v1, where they are text."""
    return _HEAD + {"v1": _V1, "v7": _V7}.get(version, _V3) + _TAIL
