"""Compare ids and masks with mistral-common's on real conversations, for all five versions.

    .venv/bin/python tests/benchmarks/reference_equality.py [--seed N] [--conversations 2000]

Draws conversations from ShareGPT anew each time (the seed is printed) and exits with 1 if a single one differs.
"""

import argparse
import multiprocessing
import random
import sys
import time

from minisft.chat.mistral_reference import VERSIONS, reference
from minisft.chat.registry import template_for
from minisft.chat.tokenizers import MistralCommonTokenizer
from minisft.data.conversations import Conversation
from minisft.data.download import find_data
from minisft.data.ledger import Ledger
from minisft.data.read_files import read
from minisft.labels.encode_row import IGNORE_INDEX, encode

WHOLE = 10**9


def differences(version: str, conversations: list[Conversation]) -> tuple[str, int, list[str], list[str]]:
    """The version, the number of tokens, and the ids of the conversations whose ids, or whose mask, differ."""
    tokenizer = MistralCommonTokenizer(version)
    template = template_for(tokenizer)
    tokens, other_ids, other_mask = 0, [], []
    for conversation in conversations:
        ids, mask = reference(conversation, version)
        row = encode(conversation, template, tokenizer, WHOLE)
        tokens += len(ids)
        if row.input_ids != ids:
            other_ids.append(conversation.id)
        if [label != IGNORE_INDEX for label in row.labels] != mask:
            other_mask.append(conversation.id)
    return version, tokens, other_ids, other_mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("--conversations", type=int, default=2000)
    options = parser.parse_args()
    started = time.monotonic()
    everything = list(read(find_data("sharegpt").path, Ledger()))
    drawn = random.Random(options.seed).sample(everything, min(options.conversations, len(everything)))
    print(f"{len(drawn):,} of {len(everything):,} conversations, --seed {options.seed}", flush=True)

    parts = 8
    jobs = [(version, drawn[i::parts]) for version in VERSIONS for i in range(parts)]
    found = {version: [0, [], []] for version in VERSIONS}
    with multiprocessing.get_context("spawn").Pool() as pool:
        for version, tokens, other_ids, other_mask in pool.starmap(differences, jobs, chunksize=1):
            found[version][0] += tokens
            found[version][1] += other_ids
            found[version][2] += other_mask

    failed = 0
    for version, (tokens, other_ids, other_mask) in found.items():
        print(f"{version:>9}: {tokens:>11,} tokens; different ids: {len(other_ids)}, masks: {len(other_mask)}")
        failed += len(other_ids) + len(other_mask)
        if other_ids or other_mask:
            print(f"{'':>11}first: {(other_ids + other_mask)[:5]}")
    print(f"{failed} differences, {time.monotonic() - started:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
