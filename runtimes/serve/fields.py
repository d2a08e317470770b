"""The fields of a request that would change the answer and are not implemented: refused by name, never ignored.

Each field is listed with the values that change nothing; these are accepted, and so is null. Fields that are in neither list,
such as `user` or `metadata`, are ignored, as in OpenAI's API.

Sources: the API references of OpenAI, vLLM, llama.cpp's server and SGLang.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_edge.errors import InputError
from gemma_edge.runtimes.serve.refused import shown

OPENAI: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "web_search_options": (),
}
OTHERS: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "ebnf": (),
    "grammar": ("",),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "min_new_tokens": (0,),
    "min_tokens": (0,),
    "mirostat": (0,),
    "n_predict": (),
    "n_probs": (0,),
    "prompt_logprobs": (),
    "regex": (),
    "repeat_penalty": (1,),
    "samplers": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structural_tag": (),
    "tfs_z": (1,),
    "top_a": (0,),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "xtc_probability": (0,),
}
UNSUPPORTED = {**OPENAI, **OTHERS}


def refuse_unsupported(body: Mapping[str, Any], unsupported: Mapping[str, tuple[Any, ...]] = UNSUPPORTED) -> None:
    """Raise InputError for the first field that the server does not have, unless its value changes nothing."""
    for name, value in body.items():
        if value is not None and name in unsupported and value not in unsupported[name]:
            raise InputError(f"{name} {shown(value)} is not supported; leave it out", field=name, value=value)


def get(body: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    """The field's value, or the default where it is absent or null.

    Raises:
        InputError: it is of another type.
    """
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {dict: "an object", bool: "true or false", int: "a whole number", str: "a text", list: "a list"}
        raise InputError(f"{name} {shown(value)} is not {words[kind]}", field=name, value=value)
    return value
