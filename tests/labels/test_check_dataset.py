"""`minisft check`: conversations and tokenized data of every kind of file, exit codes, and bad input."""

import json
import shutil

import pytest
from conftest import minisft, sharegpt_row, write_sharegpt

from minisft.chat.registry import template_for
from minisft.errors import UserError
from minisft.labels.pretokenized import Tokenized, is_tokenized


@pytest.fixture
def run():
    """Call the command line; gives exit code, stdout and stderr."""

    def call(*arguments):
        done = minisft(*arguments)
        return done.returncode, done.stdout, done.stderr

    return call


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_sharegpt(tmp_path_factory.mktemp("check") / "talks.json", rows=30, seed=5)


@pytest.fixture(scope="module")
def rows(data):
    """Thirty good rows, as `minisft encode` makes them."""
    from minisft.chat.tokenizers import load_tokenizer
    from minisft.data.ledger import Ledger
    from minisft.data.read_files import read
    from minisft.labels.encode_dataset import encode_stream

    tokenizer = load_tokenizer("mistral:v3")
    template = template_for(tokenizer)
    made = encode_stream(read(data, Ledger()), template, tokenizer, max_length=40, ledger=Ledger())
    return [{"id": row.id, "input_ids": row.input_ids, "labels": row.labels} for row in made]


@pytest.fixture
def written(tmp_path, rows):
    """Write rows as one kind of file or folder."""

    def write(kind, rows=rows):
        import datasets
        import pyarrow
        import pyarrow.parquet

        datasets.disable_progress_bars()
        path = tmp_path / f"rows.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif kind == "json":
            path.write_text(json.dumps(rows))
        elif kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif kind in ("arrow", "file.arrow"):
            table = pyarrow.Table.from_pylist(rows)
            new = pyarrow.ipc.new_stream if kind == "arrow" else pyarrow.ipc.new_file
            with new(path, table.schema) as writer:
                writer.write_table(table)
        elif kind == "saved":
            datasets.Dataset.from_list(rows).save_to_disk(path)
        elif kind == "splits":
            split = datasets.Dataset.from_list(rows).train_test_split(5, seed=0)
            split.save_to_disk(path)
        else:
            path.mkdir()
            (path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:9]))
            (path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[9:]))
        return path

    return write


KINDS = ["jsonl", "json", "parquet", "arrow", "file.arrow", "saved", "splits", "folder"]
V3 = ("--tokenizer", "mistral:v3")


@pytest.mark.parametrize("kind", KINDS)
def test_good_tokenized_data_passes_whatever_its_file(run, written, rows, data, kind):
    path = written(kind)
    assert is_tokenized(path)
    assert sorted(row.id for row in Tokenized(path)) == sorted(row["id"] for row in rows)
    code, out, _ = run("check", path, *V3, "--max-length", 40, "--against", data)
    assert code == 0, out
    assert "30 rows: every invariant holds" in out


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_row_is_named_with_turn_and_token(run, written, rows, kind):
    broken = json.loads(json.dumps(rows))
    end = broken[7]["input_ids"].index(2)
    broken[7]["labels"][end] = -100
    code, out, _ = run("check", written(kind, broken), *V3, "--json")
    report = json.loads(out)
    assert code == 1
    assert not report["ok"]
    failed = {name: entry for name, entry in report["invariants"].items() if entry["failed"]}
    assert list(failed) == ["eos"]
    assert failed["eos"]["first"][0] | {"message": ""} == {
        "row": "row0007", "turn": 0, "token": end, "invariant": "eos", "message": "",
    }  # fmt: skip
    assert failed["eos"]["checked"] == 30


@pytest.mark.parametrize("tokenizer", ["mistral:v1", "mistral:v2", "mistral:v3", "mistral:v3-tekken", "mistral:v7"])
def test_conversations_pass_with_the_reference(run, data, tokenizer):
    code, out, _ = run("check", data, "--tokenizer", tokenizer, "--truncation", "turn", "--max-length", 60)
    assert code == 0, out
    assert "reference: ids and mask" in out


def test_conversations_pass_with_another_tokenizer(run, data, tiny_model):
    for version in ("v1", "v7"):
        code, out, _ = run(
            "check", data, "--tokenizer", tiny_model, "--template", version, "--train-on", "each", "--max-length", 70
        )
        assert code == 0, out
        assert "reference" not in out


def test_what_encode_writes_passes(run, data, tiny_model, tmp_path):
    out = tmp_path / "rows.jsonl"
    options = ("--tokenizer", tiny_model, "--template", "v2", "--max-length", 50)
    assert run("encode", data, "--out", out, *options, "--train-on", "last")[0] == 0
    assert run("check", out, *options)[0] == 0
    assert run("check", out, *options, "--against", data, "--train-on", "last")[0] == 0
    code, text, _ = run("check", out, *options, "--against", data)
    assert code == 1
    assert "against: ids and labels" in text


def test_padding_that_the_mask_marks_is_left_out(run, written, rows):
    def padded(row, label):
        more = 60 - len(row["input_ids"])
        mask = [1] * len(row["input_ids"]) + [0] * more
        ids, labels = row["input_ids"] + [2] * more, row["labels"] + [label] * more
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    assert run("check", written("parquet", [padded(row, -100) for row in rows]), *V3)[0] == 0
    code, out, _ = run("check", written("parquet", [padded(row, 2) for row in rows]), *V3)
    assert code == 1
    assert "is trained, but attention_mask hides it" in out


def packed(rows, how, left=0):
    """The rows as one, as other tools pack them, with padding before and after."""
    ids, labels = ([token for row in rows for token in row[name]] for name in ("input_ids", "labels"))
    lengths = [len(row["input_ids"]) for row in rows]
    pad = {"input_ids": 0, "labels": -100, "attention_mask": 0, "position_ids": 0}
    made = {"input_ids": ids, "labels": labels}
    if how == "position_ids":
        made |= {"position_ids": [i for n in lengths for i in range(n)], "attention_mask": [1] * len(ids)}
    elif how == "attention_mask":
        made["attention_mask"] = [k for k, n in enumerate(lengths, 1) for _ in range(n)]
    elif how == "seq_lengths":
        return made | {"seq_lengths": lengths}
    else:
        return made
    return {name: [pad[name]] * left + column + [pad[name]] * 3 for name, column in made.items()}


@pytest.mark.parametrize("how", ["position_ids", "attention_mask", "seq_lengths"])
def test_rows_that_another_tool_packed_are_checked_one_by_one(run, written, rows, how):
    """TRL, axolotl: the model sees each part alone (trl 805)."""
    path = written("parquet", [packed(rows[k : k + 3], how, left=k % 2) for k in range(0, 30, 3)])
    code, out, _ = run("check", path, *V3)
    assert (code, "30 rows: every invariant holds" in out) == (0, True), out
    broken = json.loads(json.dumps(rows))
    broken[7]["labels"][broken[7]["input_ids"].index(2)] = -100
    code, out, _ = run("check", written("json", [packed(broken[k : k + 3], how) for k in range(0, 30, 3)]), *V3)
    assert code == 1
    assert "row 2, part 2" in out


def test_rows_that_are_packed_without_a_mark_are_wrong(run, written, rows):
    """Nothing tells the model either: one row attends to the other."""
    code, out, _ = run("check", written("json", [packed(rows[:2], "")]), *V3)
    assert code == 1
    assert "BOS again" in out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"position_ids": [0, 7, 7, 7]}, "do not count"),
        ({"position_ids": [0, 5, 5, 5]}, "do not count"),
        ({"position_ids": [17, 18, 19, 20]}, "do not count"),
        ({"position_ids": [3, 2, 1, 0]}, "do not count"),
        ({"position_ids": [0, "x", "x", "x"]}, "not 4 whole numbers"),
        ({"position_ids": [0, 1]}, "not 4 whole numbers"),
        ({"attention_mask": [1, 0, 1, 1]}, "hides tokens inside the row"),
        ({"attention_mask": [1, 1, 0, 0]}, "token 2 is trained, but attention_mask hides it"),
        ({"attention_mask": [0.5, 0.5, 0.5, 0.5]}, "not 4 whole numbers"),
    ],
)
def test_columns_that_contradict_the_row_are_violations(run, written, change, says):
    row = {"id": "a", "input_ids": [1, 3, 4, 2], "labels": [-100, -100, 4, 2]}
    code, out, _ = run("check", written("json", [row | change]), *V3)
    assert code == 1
    assert says in out


@pytest.mark.attack("9")
@pytest.mark.parametrize("how", ["json", "gzip"])
def test_conversations_that_are_cut_off_are_no_success(run, data, tmp_path, how):
    import gzip

    content = data.read_bytes() if how == "json" else gzip.compress(data.read_bytes())
    (tmp_path / "cut.json").write_bytes(content[: len(content) * 2 // 3])
    code, _, err = run("check", tmp_path / "cut.json", *V3)
    assert code == 1 or (how == "gzip" and code == 2)
    assert "lost: " in err or code == 2


@pytest.mark.attack("4")
def test_a_file_is_not_replaced_by_nothing(run, data, tmp_path):
    out = tmp_path / "rows.jsonl"
    out.write_text("precious")
    code, _, err = run("encode", data, *V3, "--out", out, "--max-length", 3, "--truncation", "drop")
    assert (code, out.read_text()) == (2, "precious")
    assert "no row of" in err


BAD_ROWS = [
    ({"id": "a", "input_ids": [1, "x"], "labels": [-100, 3]}, "input_ids has a str at position 1"),
    ({"id": "a", "input_ids": [1, 2.5], "labels": [-100, 3]}, "input_ids has a float at position 1"),
    ({"id": "a", "input_ids": [1, 99999], "labels": [-100, 3]}, "id 99999 is not one of the tokenizer's 32768"),
    ({"id": "a", "input_ids": [1, -5], "labels": [-100, 3]}, "id -5 is not one"),
    ({"id": "a", "input_ids": [1, 3, 4], "labels": [-100, 3]}, "3 ids and 2 labels"),
    ({"id": "a", "input_ids": None, "labels": [-100, 3]}, "input_ids is nothing, not a list"),
    ({"id": "a", "input_ids": [], "labels": []}, "no tokens at all"),
    ({"id": "a", "input_ids": [1, 3]}, "no column labels (its columns: id, input_ids)"),
    ([1, 2], "a list, not an object"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_malformed_rows_are_violations(run, written, rows, row, message):
    code, out, err = run("check", written("jsonl", [rows[0], row, rows[1]]), *V3)
    assert code == 1, err
    assert message in out
    assert "3 rows: NOT all" in out


def test_damaged_lines_are_violations(run, tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(rows[0]), '{"input_ids": [1, 2', json.dumps(rows[1]), "[" * 100_000]
    path.write_text("\n".join(lines))
    code, out, _ = run("check", path, *V3)
    assert code == 1
    assert "row rows.jsonl line 2: " in out
    assert "rows.jsonl line 4" in out


def test_a_list_that_is_cut_off_is_a_violation(run, tmp_path, rows):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows)[:-40])
    code, out, _ = run("check", path, *V3)
    assert code == 1
    assert "cut off or damaged after 29 whole rows" in out


def test_no_traceback_for_bad_input(run, tmp_path, written, data):
    def refused(*arguments):
        code, out, err = run("check", *arguments)
        assert code == 2
        assert out == ""
        assert err.count("\n") == 1 and err.startswith("minisft: "), err
        return err

    assert "does not exist" in refused(tmp_path / "none.jsonl", *V3)
    assert "--against goes with tokenized data" in refused(data, *V3, "--against", data)
    assert "not known" in refused(data, *V3, "--truncation", "word")
    assert "not known" in refused(written("jsonl"), *V3, "--train-on", "most")
    assert "goes with template v3" in refused(data, *V3, "--template", "v1")
    assert "at least 2" in refused(data, *V3, "--max-length", "1")
    assert "at least 2" in refused(written("jsonl"), *V3, "--max-length", "0")
    assert "no row is left" in refused(data, *V3, "--max-length", "2")
    assert "no id" in refused(written("jsonl", [{"input_ids": [1, 2], "labels": [1, 2]}]), *V3, "--against", data)

    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "is empty" in refused(empty, *V3)
    noise = tmp_path / "noise.arrow"
    noise.write_bytes(b"\xff\xff\xff\xff" + b"noise" * 99)
    assert "damaged Arrow" in refused(noise, *V3)
    cut = written("arrow")
    cut.write_bytes(cut.read_bytes()[:-300])
    assert "damaged Arrow" in refused(cut, *V3)
    saved = written("saved")
    (saved / "state.json").write_text("{}")
    assert "incomplete" in refused(saved, *V3)
    with pytest.raises(UserError, match="does not exist"):
        list(Tokenized(tmp_path / "none"))


ASK, TELL = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
MIXED = [  # one kept row in two, as people's reports have them
    {"messages": [ASK, TELL], "label": True, "source": "web"},
    {"messages": [ASK, TELL | {"content": "5"}], "label": False},
    {"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "1"}], "system": "Be brief."},
    {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A cat."}], "image": "x.png"},
    {"instruction": "And two?", "output": 2, "history": [["One?", "1"]]},
    {"messages": [ASK, TELL | {"tool_calls": [{"function": {"name": "sum"}}]}]},
    {"messages": [ASK, TELL | {"content": "No.", "weight": 0}, TELL | {"thinking": "Two and two."}]},
]


@pytest.mark.attack("16")
@pytest.mark.parametrize("how", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_every_command_reads_the_same_rows_and_says_what_it_did_not(run, tiny_model, tmp_path, how):
    import gzip

    import pyarrow.parquet

    from minisft.chat.tokenizers import HuggingFaceTokenizer
    from minisft.data.ledger import Ledger
    from minisft.run.config import RunConfig
    from minisft.training.dataset import load_rows, write_data

    data, out, book = (tmp_path / name for name in (f"talks.{how}", "rows.jsonl", "ledger.json"))
    rows = MIXED if how != "parquet" else [row | {"output": str(row.get("output", ""))} for row in MIXED]
    lines = ",\n".join(map(json.dumps, rows)) + ","
    if how == "parquet":
        columns = dict.fromkeys(key for row in rows for key in row)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([columns | row for row in rows]), data)
    elif how == "json":
        data.write_text(f"[{lines}]")
    else:
        data.write_bytes(gzip.compress(lines.encode()) if how.endswith("gz") else lines.encode())
    code, _, printed = run("encode", data, "--tokenizer", tiny_model, "--out", out, "--ledger", book)
    assert code == 0
    ledger = json.loads(book.read_text())
    assert {reason: entry["rows"] for reason, entry in ledger["dropped"].items()} == {
        "marked as undesirable (label)": 1, "needs images": 1, "tool calls that the template cannot show": 1,
    }  # fmt: skip
    assert {"source"} == set(ledger["unread"])
    assert {"reasoning left out: the template v1 has no place for it", "instruction/output: converted"} <= set(
        ledger["repaired"]
    )
    assert "not read: source" in printed and "dropped: needs images" in printed
    encoded = [json.loads(line) for line in out.read_text().splitlines()]
    tokenizer = HuggingFaceTokenizer(tiny_model)
    texts = [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in encoded]
    assert [text.split() for text in texts] == [["4</s>"], ["1</s>"], ["1</s>", "2</s>"], ["4</s>"]]

    assert run("check", out, "--tokenizer", tiny_model, "--against", data)[0] == 0
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[::2]))
    code, text, _ = run("check", out, "--tokenizer", tiny_model, "--against", data)
    assert code == 1 and "this conversation has no row" in text
    assert "4 rows: every invariant holds" in run("check", data, "--tokenizer", tiny_model)[1]
    assert run("show", data, "--tokenizer", tiny_model, "--row", 1)[1].startswith("3 of 26 tokens trained")
    assert "has 4 usable conversations" in run("show", data, "--tokenizer", tiny_model, "--row", 4)[2]
    config = RunConfig.course("vanilla", model=str(tiny_model), data=str(data))
    trained = Ledger()
    written = write_data(config, data, tokenizer, tmp_path / "run", trained)
    assert written == 3 and len(load_rows(tmp_path / "run")) == 3  # and one for testing
    assert trained.dropped.keys() >= ledger["dropped"].keys()
    assert trained.unread.keys() == ledger["unread"].keys()


@pytest.mark.attack("16")
def test_a_run_of_rows_that_are_numbered_has_its_test_rows(tiny_model, tmp_path):
    from minisft.chat.tokenizers import HuggingFaceTokenizer
    from minisft.data.ledger import Ledger
    from minisft.run.config import RunConfig
    from minisft.training.dataset import write_data

    data, ledger = tmp_path / "talks.jsonl", Ledger()
    rows = [sharegpt_row(f"example_{i}", ("human", f"{i}+1?"), ("gpt", str(i + 1))) for i in range(60)]
    data.write_text("\n".join(map(json.dumps, rows)))
    config = RunConfig.course("vanilla", model=str(tiny_model), data=str(data))
    assert write_data(config, data, HuggingFaceTokenizer(tiny_model), tmp_path / "run", ledger) == 54
    assert len((tmp_path / "run" / "test.jsonl").read_text().splitlines()) == 6
    one = [row | {"id": f"Qw3rTy1_{i}"} for i, row in enumerate(rows)]
    data.write_text("\n".join(map(json.dumps, one)))
    write_data(config, data, HuggingFaceTokenizer(tiny_model), tmp_path / "run", ledger)
    assert "the test side has 0 of 60 rows" in ledger.notes[0]


def test_hostile_ids_reach_no_terminal(run, tmp_path):
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps({"id": "\x1b[31m", "input_ids": [1, 5], "labels": [5, 5]}))
    code, out, _ = run("check", path, *V3)
    assert code == 1
    assert "\x1b" not in out


def test_a_long_data_set_says_how_far_it_is(run, tmp_path):
    path = tmp_path / "talks.jsonl"
    row = sharegpt_row("a", ("human", "Hi"), ("gpt", "Hello"))
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(2500)))
    code, out, err = run("check", path, *V3)
    assert code == 0
    assert "2,000 rows checked" in err
    assert "2,000 rows checked" not in out


def test_rows_that_are_dropped_are_said(run, tmp_path, tiny_model):
    rows = [sharegpt_row("a", ("human", "the cat"), ("gpt", "sat on")), sharegpt_row("b", ("human", "alone"))]
    rows += [{"input_ids": [1, 2], "labels": [-100, 2]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, text, err = run("check", tmp_path / "rows.jsonl", "--tokenizer", tiny_model)
    assert code == 0 and "1 rows: every invariant holds" in text
    assert "not checked, because dropped: no question with an answer (1)" in err
    assert "row of an unknown shape (1)" in err


def test_a_row_of_a_conversation_that_the_template_refuses_is_a_violation(run, tiny_model, tmp_path):
    """The other rows are checked all the same."""
    source = (
        "{% for m in messages %}{% if 'walls' in m['content'] %}{{ raise_exception('no walls') }}{% endif %}"
        "{{ '<|' + m['role'] + '>' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant>' }}{% endif %}"
    )
    model = shutil.copytree(tiny_model, tmp_path / "own-model")
    (model / "chat_template.jinja").write_text(source.replace("walls", "nowhere"))
    talks = [
        sharegpt_row(f"row{i}", ("human", question), ("gpt", "sat on"))
        for i, question in enumerate(["the cat", "old walls", "red rain"])
    ]
    data, out = tmp_path / "talks.json", tmp_path / "rows.jsonl"
    data.write_text(json.dumps(talks))
    options = ["--tokenizer", model, "--template", "own"]
    assert run("encode", data, *options, "--out", out)[0] == 0
    (model / "chat_template.jinja").write_text(source)
    code, text, printed = run("check", out, *options, "--against", data)
    assert (code, printed) == (1, "")
    assert "row row1: the template refuses this conversation: the template refuses it: no walls" in text
    assert "        3         1  against" in text and "3 rows: NOT all invariants hold" in text
