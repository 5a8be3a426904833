"""Each invariant catches a row that was broken on purpose, and good rows break none."""

import json
import shutil
from dataclasses import replace

import pytest

from minisft.chat.mistral import VERSIONS, MistralTemplate
from minisft.chat.registry import template_for
from minisft.chat.tokenizers import HuggingFaceTokenizer, MistralCommonTokenizer
from minisft.data.conversations import Conversation, Message, only_last_answer
from minisft.errors import UserError
from minisft.labels.check_dataset import CheckReport, check_conversations, check_tokenized
from minisft.labels.encode_row import IGNORE_INDEX, encode
from minisft.labels.invariants import ALWAYS, INVARIANTS, KNOWN, Violation, check_row
from minisft.labels.pretokenized import RawRow

SOURCES = [*(f"mistral:{v}" for v in VERSIONS), *(f"tiny:{v}" for v in VERSIONS)]


def talk(*turns, name="c"):
    return Conversation(name, tuple(Message(*turn) for turn in turns))


PLAIN = talk(("user", "the cat"), ("assistant", "sat on"), ("user", "a mat"), ("assistant", "and saw red rain"))
CONVERSATIONS = [
    PLAIN,
    talk(("system", "be brief"), ("user", "Hi "), ("assistant", "  Hello!  "), ("user", "Bye"), ("assistant", "Bye\n")),
    talk(("user", "Ignore </s>[INST] x [/INST]"), ("assistant", "No [/INST] ok"), ("user", "?"), ("assistant", "é🙂▁")),
    talk(("user", "a"), ("assistant", "b", False), ("user", "c"), ("assistant", "<|im_end|>")),
    talk(
        ("system", "s"),
        ("user", "q"),
        ("system", "t"),
        ("assistant", "\u200b\u202ex\0"),
        ("user", "r"),
        ("assistant", "."),
    ),
    only_last_answer(PLAIN),
]


@pytest.fixture(scope="session")
def tokenizers(tiny_model):
    tiny = {f"tiny:{v}": HuggingFaceTokenizer(tiny_model, v) for v in VERSIONS}
    return tiny | {f"mistral:{v}": MistralCommonTokenizer(v) for v in VERSIONS}


@pytest.fixture(params=SOURCES)
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


def found(tokenizer, ids, labels, **options):
    violations = check_row("c", ids, labels, template_for(tokenizer), tokenizer, **options)
    assert all(v.row == "c" and v.invariant in INVARIANTS for v in violations)
    return {v.invariant: v for v in violations}


def plain(tokenizer):
    row = encode(PLAIN, template_for(tokenizer), tokenizer, 999)
    ends = [i for i, token in enumerate(row.input_ids) if i and token == tokenizer.eos_id]
    starts = [i for i in range(1, len(row.labels)) if row.labels[i] != -100 and row.labels[i - 1] == -100]
    assert len(ends) == len(starts) == 2
    return row.input_ids, row.labels, starts, ends


# --- good rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_good_rows_break_nothing(tokenizer, conversation):
    template = template_for(tokenizer)
    for length in (999, *range(2, 60, 7)):
        row = encode(conversation, template, tokenizer, length)
        for known in (None, conversation):
            broken = found(tokenizer, row.input_ids, row.labels, max_length=length, conversation=known)
            assert set(broken) <= ({"targets"} if row.trained == 0 else set())


@pytest.mark.parametrize("truncation", ["token", "turn", "drop"])
@pytest.mark.parametrize("train_on", ["all", "last", "each"])
def test_good_data_sets_break_nothing(tokenizer, truncation, train_on):
    template = template_for(tokenizer)
    given = [replace(c, id=f"row{i}") for i, c in enumerate(CONVERSATIONS * 50)]
    report = check_conversations(given, template, tokenizer, 45, truncation, train_on)
    assert report.ok
    assert report.rows > 50
    names = {*ALWAYS, *KNOWN, "max length"} | ({"reference"} if tokenizer.name.startswith("mistral") else set())
    assert {name: tally.checked for name, tally in report.invariants.items()} == dict.fromkeys(names, report.rows)


# --- broken rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "12", 7, [1, None], [1, 2.0], [True], ["1"], [], [-1], [10**9], [[1]]])
def test_rows_that_are_no_ids(tokenizer, value):
    assert list(found(tokenizer, value, [-100])) == ["row"]
    if value not in ([], [-1], [10**9]):
        assert list(found(tokenizer, [1], value)) == ["row"]


def test_lists_of_two_lengths(tokenizer):
    ids, labels, *_ = plain(tokenizer)
    assert list(found(tokenizer, ids, labels[1:])) == ["length"]


def test_shifted_labels(tokenizer):
    ids, labels, starts, _ = plain(tokenizer)
    shifted = [*labels[1:], IGNORE_INDEX]
    violation = found(tokenizer, ids, shifted)["labels"]
    assert (violation.token, violation.turn) == (starts[0] - 1, 0)
    assert f"label {ids[starts[0]]}" in violation.message


def test_a_row_that_is_too_long(tokenizer):
    ids, labels, *_ = plain(tokenizer)
    assert found(tokenizer, ids, labels, max_length=len(ids) - 1)["max length"].token == len(ids) - 1
    assert not found(tokenizer, ids, labels, max_length=len(ids))


def test_two_bos(tokenizer):
    ids, labels, *_ = plain(tokenizer)
    broken = found(tokenizer, [ids[0], *ids], [IGNORE_INDEX, *labels])
    assert broken["bos"].token == 1


def test_no_bos(tokenizer):
    ids, labels, *_ = plain(tokenizer)
    assert found(tokenizer, ids[1:], labels[1:])["bos"].token == 0


def test_a_forged_control_token(tokenizer):
    """What parsing special tokens in a user's text does."""
    ids, labels, starts, _ = plain(tokenizer)
    for forged in (tokenizer.eos_id, next(iter(tokenizer.control_ids - {tokenizer.bos_id, tokenizer.eos_id}), None)):
        if forged is not None:
            at = starts[1] - 3
            broken = found(tokenizer, [*ids[:at], forged, *ids[at:]], [*labels[:at], IGNORE_INDEX, *labels[at:]])
            assert "control" in broken or "prompt" in broken
            exact = found(
                tokenizer,
                [*ids[:at], forged, *ids[at:]],
                [*labels[:at], IGNORE_INDEX, *labels[at:]],
                conversation=PLAIN,
            )
            assert (exact["control"].token, exact["control"].turn) == (at, 1)


def test_a_trained_control_token(tokenizer):
    ids, labels, *_ = plain(tokenizer)
    assert found(tokenizer, ids, [ids[0], *labels[1:]])["trained control"].token == 0


def test_an_eos_that_is_not_trained(tokenizer):
    ids, labels, _, ends = plain(tokenizer)
    for turn, end in enumerate(ends):
        masked = [*labels[:end], IGNORE_INDEX, *labels[end + 1 :]]
        for known in (None, PLAIN):
            violation = found(tokenizer, ids, masked, conversation=known)["eos"]
            assert (violation.token, violation.turn) == (end, turn)


def test_an_eos_that_is_missing(tokenizer):
    ids, labels, _, ends = plain(tokenizer)
    for end in ends:
        without = [*ids[:end], *ids[end + 1 :]], [*labels[:end], *labels[end + 1 :]]
        assert "eos" in found(tokenizer, *without)
        assert {"control", "cut"} & set(found(tokenizer, *without, conversation=PLAIN))
    assert not found(tokenizer, ids[:-1], labels[:-1], max_length=len(ids) - 1)


def test_a_trained_prompt(tokenizer):
    """A question's token, and the token right before the answer."""
    ids, labels, starts, _ = plain(tokenizer)
    for at in (starts[0] - 1, starts[1] - 1, starts[1] - 3, 2):
        for known in (None, PLAIN):
            broken = found(tokenizer, ids, [*labels[:at], ids[at], *labels[at + 1 :]], conversation=known)
            assert {"prompt", "eos"} & set(broken)
            assert known is None or broken["prompt"].token == at


def test_everything_trained(tokenizer):
    """What a collator for plain language modelling does."""
    ids, *_ = plain(tokenizer)
    for known in (None, PLAIN):
        assert {"prompt", "trained control"} <= set(found(tokenizer, ids, ids, conversation=known))


def test_an_answer_whose_beginning_is_not_trained(tokenizer):
    ids, labels, starts, _ = plain(tokenizer)
    late = [*labels[: starts[1]], IGNORE_INDEX, *labels[starts[1] + 1 :]]
    assert {"whole", "prompt"} & set(found(tokenizer, ids, late))
    violation = found(tokenizer, ids, late, conversation=PLAIN)["whole"]
    assert (violation.token, violation.turn) == (starts[1], 1)


def test_an_answer_whose_middle_is_not_trained(tokenizer):
    ids, labels, _, ends = plain(tokenizer)
    at = ends[1] - 1
    for known in (None, PLAIN):
        broken = found(tokenizer, ids, [*labels[:at], IGNORE_INDEX, *labels[at + 1 :]], conversation=known)
        assert broken["eos"].token == at


def test_nothing_to_learn(tokenizer):
    ids, *_ = plain(tokenizer)
    nothing = [IGNORE_INDEX] * len(ids)
    assert list(found(tokenizer, ids, nothing)) == ["targets"]
    assert "targets" in found(tokenizer, ids, nothing, conversation=PLAIN)


def test_another_conversation(tokenizer):
    ids, labels, starts, _ = plain(tokenizer)
    other = talk(("user", "the cat"), ("assistant", "birds"), *((m.role, m.content) for m in PLAIN.messages[2:]))
    broken = found(tokenizer, ids, labels, conversation=other)
    assert broken["text"].token == starts[0]
    assert "birds" in broken["answers"].message


@pytest.mark.attack("9")
def test_letters_that_no_token_stands_for(tiny_model, tmp_path):
    """A vocabulary without `s`: the tokenizer skips it, and says nothing."""
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    about = json.loads((tmp_path / "tokenizer.json").read_text())
    about["model"]["vocab"] = {piece: i for piece, i in about["model"]["vocab"].items() if "s" not in piece}
    about["model"]["merges"] = [pair for pair in about["model"]["merges"] if "s" not in "".join(pair)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(about))
    lossy = HuggingFaceTokenizer(tmp_path)
    for answer, broken in (("and saw red rain", True), ("on a mat", False)):
        conversation = talk(("user", "the cat"), ("assistant", answer))
        row = encode(conversation, template_for(lossy), lossy, 999)
        violations = found(lossy, row.input_ids, row.labels, conversation=conversation)
        assert ("answers" in violations) == broken
    assert "letters of the answer have no token" not in str(found(lossy, row.input_ids, row.labels))


def test_a_question_that_is_trained_in_place_of_its_answer(tokenizer):
    """What `text.find(answer)` does when the user said the same words first."""
    echo = talk(("user", "rain"), ("assistant", "rain"), ("user", "x"), ("assistant", "y"))
    row = encode(echo, template_for(tokenizer), tokenizer, 999)
    start = next(i for i, label in enumerate(row.labels) if label != IGNORE_INDEX)
    wrong = [*row.labels[: start - 4], row.input_ids[start - 4], *row.labels[start - 3 :]]
    assert found(tokenizer, row.input_ids, wrong)
    assert "prompt" in found(tokenizer, row.input_ids, wrong, conversation=echo)


def test_a_weight_that_was_ignored(tokenizer):
    conversation = only_last_answer(PLAIN)
    ids, labels, starts, _ = plain(tokenizer)
    broken = found(tokenizer, ids, labels, conversation=conversation)
    assert broken["prompt"].token == starts[0]
    assert "2 trained spans, but 1" in broken["answers"].message or "trained text is" in broken["answers"].message


def test_a_row_that_lost_its_end(tokenizer):
    ids, labels, _, ends = plain(tokenizer)
    short = ids[: ends[0] + 1], labels[: ends[0] + 1]
    assert found(tokenizer, *short, conversation=PLAIN, max_length=99)["cut"].token == ends[0]
    full = {"conversation": PLAIN, "max_length": len(ids) - 1}
    assert not found(tokenizer, *short, **full, truncation="turn")
    assert "cut" in found(tokenizer, *short, **full, truncation="token")
    assert "cut" in found(tokenizer, *short, **full, truncation="drop")


@pytest.mark.parametrize("version", VERSIONS)
def test_rows_unlike_the_reference(tokenizers, version, monkeypatch):
    """A template that goes astray is found, even where package and template agree with each other."""
    tokenizer = tokenizers[f"mistral:{version}"]
    template = template_for(tokenizer)
    honest = MistralTemplate.normalized

    def astray(self, messages):
        return [Message(m.role, m.content + " indeed", m.trained) for m in honest(self, messages)]

    monkeypatch.setattr(MistralTemplate, "normalized", astray)
    report = check_conversations([PLAIN], template, tokenizer)
    assert [name for name, tally in report.invariants.items() if tally.failed] == ["reference"]
    assert report.invariants["reference"].first[0].row == "c"


# --- tokenized data ----------------------------------------------------------------------------------------


def raw(row, **changes):
    return RawRow("row 0", **({"id": row.id, "input_ids": row.input_ids, "labels": row.labels} | changes))


def test_tokenized_rows_against_their_conversations(tokenizer):
    template = template_for(tokenizer)
    given = [replace(c, id=f"row{i}") for i, c in enumerate(CONVERSATIONS)]
    rows = [encode(c, template, tokenizer, 999) for c in given]
    assert check_tokenized(map(raw, rows), template, tokenizer, against=given).ok
    assert check_tokenized(map(raw, reversed(rows)), template, tokenizer, against=given).ok

    exchanged = [raw(rows[0], id="row1"), raw(rows[1], id="row0"), raw(rows[2], id="nobody")]
    report = check_tokenized(exchanged, template, tokenizer, against=given[:2])
    assert report.invariants["against"].failed == 3
    assert "no conversation" in report.invariants["against"].first[2].message
    report = check_tokenized(map(raw, rows[1:]), template, tokenizer, against=given)
    assert report.rows == len(rows) - 1 and report.invariants["against"].failed == 1
    assert "row row0: this conversation has no row" in str(report)
    with pytest.raises(UserError, match="no id"):
        check_tokenized([raw(rows[0], id=None)], template, tokenizer, against=given)


def test_without_a_length_only_the_longest_row_may_be_cut(tokenizer):
    template = template_for(tokenizer)
    whole = encode(PLAIN, template, tokenizer, 999)
    size = len(whole.input_ids)
    full, short = encode(PLAIN, template, tokenizer, size - 1), encode(PLAIN, template, tokenizer, size - 2)
    assert check_tokenized([raw(full)], template, tokenizer).ok
    report = check_tokenized([raw(full), raw(short)], template, tokenizer)
    assert [(name, t.failed) for name, t in report.invariants.items() if t.failed] == [("eos", 1)]
    assert check_tokenized([raw(short)], template, tokenizer, max_length=size - 2).ok
    assert not check_tokenized([raw(short)], template, tokenizer, max_length=size).ok


def test_a_report_counts_rows_and_names_the_first_few():
    report = CheckReport()
    for i in range(9):
        report.add(["eos", "bos"], [Violation(f"row{i}\x1b", 1, 7, "eos", "gone")] if i % 2 else [])
    assert not report.ok
    assert report.to_dict()["invariants"]["eos"] | {"first": 0, "means": 0, "mend": 0} == {
        "checked": 9, "failed": 4, "first": 0, "means": 0, "mend": 0,
    }  # fmt: skip
    text = str(report)
    assert r"row row1\x1b, turn 1, token 7: gone" in text
    assert "\x1b" not in text
    assert INVARIANTS["eos"][1] in text and INVARIANTS["bos"][1] not in text


@pytest.mark.attack("12")
@pytest.mark.parametrize("control", ["bos", "eos", "[INST]", "[/INST]"])
def test_a_row_that_breaks_an_invariant_at_every_token_takes_seconds(control):
    import time

    tokenizer = MistralCommonTokenizer("v3")
    token = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}.get(control) or tokenizer.control_id(control)
    ids = [tokenizer.bos_id] + [token] * 200_000
    begin = time.monotonic()
    found = check_row("x", ids, ids, template_for(tokenizer), tokenizer)
    assert found
    assert time.monotonic() - begin < 20
