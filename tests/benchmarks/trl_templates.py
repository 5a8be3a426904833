"""Compares `--template own` with templates that TRL's authors patched by hand, one pair after the other.

    pip download --no-deps --dest trl trl && unzip -d trl trl/*.whl
    python tests/benchmarks/trl_templates.py trl/trl/chat_templates [--conversations 200] [--show NAME] [--out FILE]

With `--out`, the counts go to a file, too: notebook 01 shows those in `trl_templates.json`.

For each `X.jinja` with an `X_training.jinja`: this package labels conversations by the original alone; TRL's mask comes
from the `{% generation %}` marks of the patched one, through transformers' `return_assistant_tokens_mask`. Every
difference is put into one of the classes below, by rule; what fits none is counted as unexplained, and the exit code
is then 1. Where the original shows tools, as many conversations with tool calls are compared too.

    same              ids and mask are equal
    end only          TRL also trains what the template writes after the token at which generation stops
    begin only        TRL also trains a part of the generation prompt, or leaves out what the template writes after it
    both              the two before
    other text        the patched template writes other text than the original (it keeps earlier thoughts, for example);
                      ours is checked to be the original's, and each labels its own
    fewer             the original writes some answers otherwise than inference does; these are not trained here
    refused           this package refuses the conversation, with the reason
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import AutoTokenizer
from transformers.utils import logging

from minisft.chat.jinja_template import as_chat
from minisft.chat.own_template import template_of
from minisft.chat.registry import template_for
from minisft.chat.template import RefusedConversation
from minisft.chat.tokenizers import HuggingFaceTokenizer
from minisft.data.conversations import Conversation, Message
from minisft.data.download import find_tokenizer
from minisft.errors import UserError
from minisft.labels.encode_row import IGNORE_INDEX, encode

# What templates write as control tokens: none of the tokenizers is at hand, so the packaged one gets these tokens.
CONTROL = re.compile(
    r"<\|[^|<>{}'\"\s]+\|>|<｜[^<>｜]+｜>|</?s>|<(?:bos|eos)>|<(?:start|end)_of_\w+>|<\|turn>|<turn\|>|<\|channel>"
    r"|<channel\|>|\[/?INST\]|\[gMASK\]|<sop>"
)
EXPLAINED = ("same", "end only", "begin only", "both", "other text", "fewer", "refused")
# The token at which generation stops, where the template does not show it by itself.
STOPS = {"gptoss": ["<|return|>", "<|call|>"]}  # of its generation_config.json
EOS = {"cohere2": "<|END_OF_TURN_TOKEN|>", "gptoss": "<|return|>"}
LOOK_UP = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks something up",
        "parameters": {
            "type": "object",
            "properties": {"what": {"type": "string", "description": "what"}, "count": {"type": "integer"}},
            "required": ["what"],
        },
    },
}
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "red", "rain", "over", "old", "stone", "walls")


def conversations(count: int) -> list[Conversation]:
    """System prompts, one to four exchanges, and white space of all kinds around the texts."""
    chance = random.Random(0)

    def text() -> str:
        words = " ".join(chance.choices(WORDS, k=chance.randint(1, 9)))
        return chance.choice(["", "", "", " ", "\n", "\n\n"]) + words + chance.choice(["", "", ".", "\n", "  "])

    made = []
    for i in range(count):
        turns = [Message("system", text())] * (chance.random() < 0.3)
        for _ in range(chance.randint(1, 4)):
            turns += [Message("user", text()), Message("assistant", text())]
        made.append(Conversation(str(i), tuple(turns)))
    return made


def tool_conversations(count: int) -> list[Conversation]:
    """Questions that are answered after a call, or after two calls one after the other."""
    chance = random.Random(1)

    def words(most: int = 5) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(1, most)))

    made = []
    for i in range(count):
        turns = [Message("system", words())] * (chance.random() < 0.3)
        for turn in range(chance.randint(1, 2)):
            turns.append(Message("user", words()))
            for step in range(chance.randint(1, 2)):
                call_id = f"call0{turn}{step}00"
                arguments = {"what": words(), "count": chance.randint(0, 9)}
                call = {"type": "function", "id": call_id, "function": {"name": "look_up", "arguments": arguments}}
                turns.append(Message("assistant", "", tool=json.dumps({"tool_calls": [call]})))
                result = {"name": "look_up", "tool_call_id": call_id}
                turns.append(Message("tool", words(), tool=json.dumps(result)))
            turns.append(Message("assistant", words(9)))
        made.append(Conversation(str(i), tuple(turns), json.dumps([LOOK_UP])))
    return made


def tokenizer_of(source: str, base: Any, folder: Path, eos: str) -> HuggingFaceTokenizer:
    """The packaged tokenizer with this template, its control tokens, and the end of its answers as EOS."""
    hf = copy.deepcopy(base)
    hf.add_special_tokens({"extra_special_tokens": list(dict.fromkeys(CONTROL.findall(source)))})
    hf.chat_template = source
    hf.eos_token = eos
    hf.save_pretrained(folder)
    stops = {"eos_token_id": hf.convert_tokens_to_ids(STOPS.get(folder.name, []))}
    (folder / "generation_config.json").write_text(json.dumps(stops))
    hf.eos_token = template_of(AutoTokenizer.from_pretrained(folder)).stops[0]
    hf.save_pretrained(folder)
    return HuggingFaceTokenizer(folder, "own")


def compare(conversation: Conversation, tokenizer: HuggingFaceTokenizer, patched: str) -> str:
    template = template_for(tokenizer)
    try:
        row = encode(conversation, template, tokenizer, 1 << 30)
    except RefusedConversation as reason:
        return f"refused: {reason}"
    chat = as_chat(conversation.messages, template.text_arguments)
    tools = json.loads(conversation.tools) if conversation.tools else None
    theirs = tokenizer.hf.apply_chat_template(
        as_chat(conversation.messages),
        tools=tools,
        chat_template=patched,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    # By text: the same text may be cut into tokens in two ways where an answer begins.
    labelled = zip(row.input_ids, row.labels, strict=True)
    ours = [(tokenizer.decode([token]), label != IGNORE_INDEX) for token, label in labelled]
    masked = zip(theirs["input_ids"], theirs["assistant_masks"], strict=True)
    them = [(tokenizer.decode([token]), bool(trained)) for token, trained in masked]
    text = "".join(piece for piece, _ in ours)
    if text != tokenizer.decode(tokenizer.hf.apply_chat_template(chat, tools=tools)["input_ids"]):
        return "not the original's text"
    if text != "".join(piece for piece, _ in them):
        return "other text"
    found, expected = trained_ranges(ours), trained_ranges(them)
    if 0 < len(found) < len(expected) == len(found) + unlike_inference(conversation, tokenizer, text):
        return "fewer"
    return classify(found, expected, text, template.ends)


def unlike_inference(conversation: Conversation, tokenizer: HuggingFaceTokenizer, text: str) -> int:
    """The number of answers that the original does not write as inference does: after their own prompt, and with a
    token at which generation stops.
    """
    tools = json.loads(conversation.tools) if conversation.tools else None
    chat = as_chat(conversation.messages, template_for(tokenizer).text_arguments)
    ends = template_for(tokenizer).ends
    count = 0
    for i in (i for i, message in enumerate(chat) if message["role"] == "assistant"):
        prompt, answered = (
            tokenizer.hf.apply_chat_template(chat[:n], tools=tools, add_generation_prompt=n == i, tokenize=False)
            for n in (i, i + 1)
        )
        same = os.path.commonprefix([text, answered])  # noqa: RUF071 (texts, not paths)
        count += not (text.startswith(prompt) and any(end in same[len(prompt) :] for end in ends))
    return count


def trained_ranges(tokens: list[tuple[str, bool]]) -> list[tuple[int, int]]:
    """(start, end) in characters of each run of trained tokens."""
    ranges: list[tuple[int, int]] = []
    place = 0
    for text, trained in tokens:
        if trained and ranges and ranges[-1][1] == place:
            ranges[-1] = ranges[-1][0], place + len(text)
        elif trained:
            ranges.append((place, place + len(text)))
        place += len(text)
    return ranges


def classify(ours: list[tuple[int, int]], theirs: list[tuple[int, int]], text: str, ends: tuple[str, ...]) -> str:
    if len(ours) != len(theirs):
        return "another number of answers"
    begins = ends_differ = False
    for (begin, end), (their_begin, their_end) in zip(ours, theirs, strict=True):
        if not text[begin:end].endswith(ends):
            return "an answer of ours has no end"
        if end != their_end and not (their_end > end and not CONTROL.sub("", text[end:their_end]).strip()):
            return "another end"
        begins = begins or begin != their_begin
        ends_differ = ends_differ or end != their_end
    return ("both" if ends_differ else "begin only") if begins else "end only" if ends_differ else "same"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--out", type=Path, help="JSON file for the counts")
    parser.add_argument("--show", default="", help="show one conversation of this pair, and both masks")
    options = parser.parse_args()
    logging.set_verbosity_error()
    base = AutoTokenizer.from_pretrained(find_tokenizer("smollm2"))
    pairs = unexplained = 0
    table: dict[str, dict[str, int]] = {}
    for patched in sorted(options.folder.glob("*_training.jinja")):
        name = patched.stem.removesuffix("_training")
        if options.show not in ("", name) or not (source := patched.with_name(f"{name}.jinja")).exists():
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                tokenizer = tokenizer_of(source.read_text(), base, Path(folder) / name, EOS.get(name, "<|endoftext|>"))
            except UserError as error:
                print(f"{name:26} not compared: {error}")
                continue
            kinds = {name: conversations(options.conversations)}
            if template_for(tokenizer).has_tools:
                kinds[f"{name}, tools"] = tool_conversations(options.conversations)
            for kind, talks in kinds.items():
                counts = Counter(compare(conversation, tokenizer, patched.read_text()) for conversation in talks)
                strange = {what: n for what, n in counts.items() if what.partition(":")[0] not in EXPLAINED}
                unexplained += sum(strange.values())
                table[kind] = dict(counts.most_common())
                print(f"{kind:26} {', '.join(f'{what} {n}' for what, n in counts.most_common())}")
            if options.show:
                show(tokenizer, patched.read_text())
        pairs += 1
    print(f"{pairs} pairs, {unexplained} unexplained differences")
    if options.out:
        options.out.write_text(json.dumps({"conversations": options.conversations, "pairs": table}, indent=1) + "\n")
    sys.exit(1 if unexplained else 0)


def show(tokenizer: HuggingFaceTokenizer, patched: str) -> None:
    conversation = Conversation("c", (Message("user", "Hi"), Message("assistant", "Hello!")))
    row = encode(conversation, template_for(tokenizer), tokenizer, 1 << 30)
    chat = [{"role": m.role, "content": m.content} for m in conversation.messages]
    theirs = tokenizer.hf.apply_chat_template(
        chat, chat_template=patched, return_assistant_tokens_mask=True, return_dict=True
    )
    print("text:  ", repr(tokenizer.decode(row.input_ids)))
    print("minisft:", repr(tokenizer.decode([label for label in row.labels if label != IGNORE_INDEX])))
    trained = [i for i, mask in zip(theirs["input_ids"], theirs["assistant_masks"], strict=True) if mask]
    print("TRL:    ", repr(tokenizer.decode(trained)))


if __name__ == "__main__":
    main()
