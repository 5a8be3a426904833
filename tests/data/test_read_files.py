"""Every kind of dirt in a file, and the line in the ledger that it must produce."""

import errno
import gzip
import itertools
import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import mutations
import pyarrow
import pyarrow.parquet
import pytest
from conftest import sharegpt_row
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conversations import rows as any_rows

from minisft.data import json_text, read_files
from minisft.data.conversations import Message
from minisft.data.data_files import DataFile, _Plain
from minisft.data.ledger import Ledger
from minisft.data.read_files import PATIENCE, read, rows_of
from minisft.errors import UserError

GOOD = sharegpt_row("a", ("human", "Hi"), ("gpt", "Hello!"))
TALK = (("human", "question " * 20), ("gpt", "answer " * 20))


def good(row_id):
    return GOOD | {"id": row_id}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "data.json"


def ids_in(file):
    """The ids that were read, and the ledger, whose sums are checked."""
    ledger = Ledger()
    ids = [c.id for c in read(file, ledger)]
    adds_up(ledger)
    assert ledger.stages["cleaned"].rows == len(ids) == len(set(ids))
    return ids, ledger


def adds_up(ledger):
    dropped = sum(entry.rows for entry in ledger.dropped.values())
    assert ledger.stages["raw"].rows == ledger.stages["cleaned"].rows + dropped


# --- shapes of files ---------------------------------------------------------------------------------------

ROWS = [GOOD, sharegpt_row("b", ("user", "é🙂"), ("assistant", "Ja"))]
LIST, LINES = json.dumps(ROWS).encode(), b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
FORMS = {
    "list": LIST,
    "list in UTF-8": json.dumps(ROWS, ensure_ascii=False).encode(),
    "pretty list": json.dumps(ROWS, indent=2).encode(),
    "list with CRLF": json.dumps(ROWS, indent=2).replace("\n", "\r\n").encode(),
    "list of JSON strings": json.dumps([json.dumps(row) for row in ROWS]).encode(),
    "list without commas": b"[" + b"\n".join(json.dumps(row).encode() for row in ROWS) + b"]",
    "list after white space": b" \r\n\t" + LIST + b"\n\n",
    "lines": LINES,
    "lines without the last line end": LINES[:-1],
    "lines with CRLF": LINES.replace(b"\n", b"\r\n"),
    "lines with blank lines": b"\n \n" + LINES.replace(b"\n", b"\n\n"),
    "lines of JSON strings": b"".join(json.dumps(json.dumps(row)).encode() + b"\n" for row in ROWS),
    "wrapped": json.dumps({"version": 1, "data": ROWS}).encode(),
    "wrapped with a line end": json.dumps({"train": ROWS}).encode() + b"\r\n",
    "pretty wrapped": json.dumps({"data": ROWS, "n": [1, 2]}, indent=1).encode(),
    "wrapped after a blank line": b"\n" + json.dumps({"data": ROWS}).encode(),
    "pretty objects": b"\n".join(json.dumps(row, indent=2).encode() for row in ROWS),
}


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_conversations(file, form, bom):
    file.write_bytes(bom + FORMS[form])
    ledger = Ledger()
    first, second = read(file, ledger)
    assert (first.id, second.id) == ("a", "b")
    assert first.messages == (Message("user", "Hi"), Message("assistant", "Hello!"))
    assert second.messages == (Message("user", "é🙂"), Message("assistant", "Ja"))
    assert ledger.stages["raw"].rows == ledger.stages["cleaned"].rows == 2
    expected = ["byte-order mark: removed"] * bool(bom) + ["JSON inside a string: parsed"] * ("strings" in form)
    assert (list(ledger.repaired), ledger.dropped, ledger.lost) == (expected, {}, [])


def test_one_object_over_many_lines_is_one_row(file):
    file.write_text(json.dumps(GOOD, indent=2))
    assert ids_in(file)[0] == ["a"]


def test_turns_as_a_json_string_are_parsed(file):
    file.write_text(json.dumps([GOOD | {"conversations": json.dumps(GOOD["conversations"])}]))
    ids, ledger = ids_in(file)
    assert ids == ["a"]
    assert ledger.repaired["JSON inside a string: parsed"].first == ["a"]


def test_a_folder_is_read_file_by_file(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "a.json").write_text(json.dumps([good("a")]))
    (tmp_path / "more" / "b.jsonl").write_text(json.dumps(good("b")))
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "README.md").write_text("no data")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([good("c")]), tmp_path / "c.parquet")
    assert ids_in(tmp_path)[0] == ["a", "c", "b"]


# --- Parquet -----------------------------------------------------------------------------------------------


def test_parquet_with_dirt(tmp_path):
    messy = [
        GOOD,
        sharegpt_row("b", ("gpt", "early"), ("human", "Hi\r\n"), ("chatgpt", "ok"), ("human", "")),
        {"id": None, "conversations": None},
        {"id": "a", "conversations": GOOD["conversations"]},
        sharegpt_row("c", ("tool", "1")),
        {"id": "d", "conversations": [{"from": "human", "value": None}, {"from": None, "value": "x"}]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(messy), tmp_path / "x.parquet")
    ids, ledger = ids_in(tmp_path / "x.parquet")
    assert ids == ["a", "b", "a#2"]
    assert set(ledger.dropped) == {
        "unknown role 'tool'",
        "a turn without role and text",
        "row of an unknown shape",
    }
    assert ledger.repaired["id seen before: numbered"].first == ["a"]
    assert {"answer before any question: removed", "CR or CRLF line endings: converted to LF"} < set(ledger.repaired)


def test_parquet_of_mixed_shapes_fills_the_other_columns_with_none(tmp_path):
    rows = [
        GOOD,
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "ok", "weight": 1}]},
        {"instruction": "Add", "input": None, "output": "3"},
        {"conversations": json.dumps(GOOD["conversations"])},
    ]
    kinds = {key: None for row in rows for key in row}
    for i, row in enumerate(rows[:3]):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(kinds) | row]), tmp_path / f"{i}.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[3:]), tmp_path / "3.parquet")
    ids, ledger = ids_in(tmp_path)
    assert ids == ["a", "1.parquet row 0", "2.parquet row 0", "3.parquet row 0"]
    assert not ledger.dropped


def test_damaged_parquet_is_refused(tmp_path):
    whole = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([good(f"r{i}") for i in range(50)]), whole)
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged Parquet"):
        list(read(cut, Ledger()))
    # A byte that is not UTF-8 in a text column: pyarrow can write it, but Python cannot read it.
    text = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.array([0, 2], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"a\xff")]
    )
    pyarrow.parquet.write_table(pyarrow.table({"instruction": text, "output": ["x"]}), cut)
    with pytest.raises(UserError, match="damaged Parquet"):
        list(read(cut, Ledger()))


@pytest.mark.attack("15")
def test_parquet_with_dates_out_of_range_costs_only_rows_that_need_them(tmp_path):
    days = pyarrow.array([2**31 - 1, -(2**31), 0], pyarrow.int32()).cast(pyarrow.date32())
    table = pyarrow.Table.from_pylist([good(f"r{i}") for i in range(3)])
    unneeded = table.append_column("day", days).append_column("when", days.cast(pyarrow.timestamp("s")))
    pyarrow.parquet.write_table(unneeded, tmp_path / "x.parquet")
    ids, ledger = ids_in(tmp_path / "x.parquet")
    assert ids == ["r0", "r1", "r2"]
    assert {name: entry.rows for name, entry in ledger.unread.items()} == {"day": 3, "when": 3}
    pyarrow.parquet.write_table(table.append_column("label", days), tmp_path / "x.parquet")
    ids, ledger = ids_in(tmp_path / "x.parquet")
    assert ids == ["r2"]
    assert [entry.rows for entry in ledger.dropped.values()] == [2]
    assert "a value of label cannot be read" in next(iter(ledger.dropped))


@pytest.mark.attack("16")
def test_columns_of_a_table_that_nothing_reads_are_counted_where_they_have_a_value(tmp_path):
    more = [{"source": "web", "tags": [], "n": 1}, {"source": "", "tags": ["a"], "n": None}, {"source": None}]
    rows = [good(f"r{i}") | one for i, one in enumerate(more)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    ids, ledger = ids_in(tmp_path / "x.parquet")
    assert len(ids) == 3
    assert {name: entry.first for name, entry in ledger.unread.items()} == {
        "source": ["r0"], "tags": ["r1"], "n": ["r0"],
    }  # fmt: skip


# --- damaged rows ------------------------------------------------------------------------------------------

BROKEN = {
    "no colon": '{"id" "x", "conversations": []}',
    "a comma too many": '{"id": "x",, "a": [1, 2]}',
    "brackets in texts": r'{"id": "]}, \" {[", oops: "[[[", "b": {"c": ["]"]}}',
    "bare words": "undefined",
    "single quotes": "{'id': 'x', 'conversations': [{'from': 'human'}]}",
    "a bad escape": r'{"id": "\x"}',
    "half an escape": r'{"id": "\u12"}',
    "too many brackets": '{"id": "x"}}',
}


@pytest.mark.parametrize("form", ["list", "lines"])
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_row_is_skipped_and_later_rows_are_kept(file, broken, form):
    good_rows = [json.dumps(good(f"r{i}")) for i in range(4)]
    parts = [good_rows[0], BROKEN[broken], *good_rows[1:3], BROKEN[broken], good_rows[3]]
    file.write_text("[" + ",\n".join(parts) + "]" if form == "list" else "\n".join(parts))
    ids, ledger = ids_in(file)
    assert ids == ["r0", "r1", "r2", "r3"]
    assert ledger.lost == []
    if broken != "too many brackets":  # in a list, the text before the extra bracket is a row
        places = ["row 1", "row 4"] if form == "list" else ["line 2", "line 5"]
        assert ledger.dropped.keys() == {"row is not valid JSON"}
        assert ledger.dropped["row is not valid JSON"].first == [f"data.json {place}" for place in places]


@pytest.mark.parametrize("form", ["list", "lines"])
@pytest.mark.parametrize("broken", [*BROKEN.values(), '{"id": "x",', "[]", "3", '{"conversations": [{"from": 3}]}'])
def test_a_bad_first_row_does_no_harm(file, broken, form):
    if form == "list" and broken.endswith(","):
        broken = broken[:-1] + "}}"
    parts = [broken, json.dumps(good("r0")), json.dumps(good("r1"))]
    if form == "lines" and broken[0] not in "{":
        parts.insert(0, json.dumps(good("first")))  # otherwise it is not detected as JSON lines
    file.write_text("[" + ",".join(parts) + "]" if form == "list" else "\n".join(parts))
    ids, ledger = ids_in(file)
    assert ids[-2:] == ["r0", "r1"]
    assert ledger.dropped


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("form", ["list", "lines"])
def test_a_row_nested_100000_deep_costs_nothing_but_itself(file, form, at):
    for nested in ("[" * 100_000 + "]" * 100_000, '{"id": ' + '{"a": ' * 100_000 + "1" + "}" * 100_001):
        parts = [json.dumps(good(f"r{i}")) for i in range(3)]
        parts.insert(at, nested)
        file.write_text("[" + ",".join(parts) + "]" if form == "list" else "\n".join(parts))
        if form == "lines" and at == 0 and nested[0] == "[":
            continue  # by its first character, the file is a list
        tracemalloc.start()
        began = time.perf_counter()
        ids, ledger = ids_in(file)
        assert time.perf_counter() - began < 10
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
        tracemalloc.stop()
        assert ids == ["r0", "r1", "r2"]
        assert list(ledger.dropped) == ["row is nested too deeply"]


def test_a_file_of_one_endless_row_is_refused(file):
    file.write_text('{"id": 1, "conversations": ' + "[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        list(read(file, Ledger()))


@pytest.mark.parametrize("form", ["list", "lines"])
def test_a_row_of_100_mb_is_dropped_and_the_others_are_kept(tmp_path, form):
    """Runs in a separate process, to measure its memory."""
    file = tmp_path / "big.json"
    start, end, between = ("[", "]", ",\n") if form == "list" else ("", "", "\n")
    with file.open("w") as stream:
        stream.write(start + json.dumps(good("r0")) + between)
        stream.write('{"id": "big", "conversations": [{"from": "human", "value": "')
        for _ in range(100):
            stream.write("All work and no pl\\ny" * 50_000)
        stream.write('"}]}' + between + json.dumps(good("r1")) + end)
    code = (
        "import json, sys; from pathlib import Path\n"
        "from minisft.data.ledger import Ledger; from minisft.data.read_files import read\n"
        "from minisft.zero.measured_memory import peak_bytes\n"
        "before = peak_bytes('cpu')\n"
        "ledger = Ledger(); ids = [c.id for c in read(Path(sys.argv[1]), ledger)]\n"
        "used = (peak_bytes('cpu') - before) // 1024\n"
        "print(json.dumps([ids, ledger.to_dict(), used]))"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - began
    ids, ledger, used = json.loads(done.stdout)
    assert ids == ["r0", "r1"]
    assert ledger["dropped"] == {"a message of more than 2,000,000 characters": {"rows": 1, "first": ["big"]}}
    assert ledger["stages"]["raw"]["rows"] == 3
    assert seconds < 10
    assert used < 1_000_000  # kilobytes


def test_a_row_across_many_chunks_is_read_whole(file, monkeypatch):
    """Every way to cut the text between two reads gives the same rows."""
    broken = r'{"id": "x", oops: "] , } \" [", "y": [{"z": 1}, "a,b"]}'
    rows = [good(f"r{i}") | {"n": [1, -2.5e3, True, None, 'é\\"\n']} for i in range(3)]
    text = "[" + json.dumps(rows[0]) + ", " + broken + ",\n" + ", ".join(map(json.dumps, rows[1:])) + "\n]"
    file.write_text(text, encoding="utf-8")
    for chunk in itertools.chain(range(1, 40), range(40, 400, 7)):
        monkeypatch.setattr(json_text, "CHUNK", chunk)
        found = list(rows_of(file, Ledger()))
        assert [row for _, row in found if isinstance(row, dict)] == rows, chunk
        assert len(found) == 4


@pytest.mark.parametrize("form", ["list", "lines"])
def test_damage_without_an_end_is_not_read_into_memory(file, monkeypatch, form):
    """After an unclosed bracket the rest of a list is lost; JSON lines continue on the next line."""
    monkeypatch.setattr(json_text, "CHUNK", 100)
    monkeypatch.setattr(json_text, "LONGEST_ROW", 1000)
    rows = [json.dumps(good("r0")), '{"id": [[[', *(json.dumps(good(f"r{i}")) for i in range(1, 500))]
    file.write_text("[" + ",".join(rows) + "]" if form == "list" else "\n".join(rows) + "\n" + "x" * 2500)
    ids, ledger = ids_in(file)
    if form == "list":
        assert ids == ["r0"]
        assert "cut off or damaged after 1 whole rows" in ledger.lost[0]
    else:
        assert len(ids) == 500
        assert ledger.dropped["row is not valid JSON"].rows == 1 + 3


SOUPS = {"commas": ",", "half a word": "nul,", "broken objects": "{x},"}


@pytest.mark.attack("12")
@pytest.mark.parametrize("soup", SOUPS)
def test_a_megabyte_of_broken_values_takes_seconds(file, soup):
    """Each broken value used to cost time for all text before it: over 30 seconds for this file."""
    file.write_text(
        f"[{json.dumps(good('r0'))},{SOUPS[soup] * (1_000_000 // len(SOUPS[soup]))}{json.dumps(good('r1'))}]"
    )
    began = time.perf_counter()
    ids, ledger = ids_in(file)
    assert time.perf_counter() - began < 20
    assert ids[0] == "r0"
    assert ids[1:] == ["r1"] or ledger.lost
    if soup == "commas":
        assert ledger.repaired["commas without a row: skipped"].rows == 1


PIECES = [*'"[]{},\\ \n:\x00-é1', "nul", '{"a":1}', "1e9", '"a"', "\ufeff", '{"a" 1}']


@pytest.mark.attack("12")
@settings(max_examples=20)
@given(pieces=st.lists(st.sampled_from(PIECES), min_size=1, max_size=5), lines=st.booleans())
def test_work_is_linear_in_the_file_whatever_is_in_it(tmp_path_factory, pieces, lines):
    """Twice the input takes about twice the time, or negligible time."""
    file = tmp_path_factory.mktemp("soup") / "data.json"

    def seconds(times):
        body = "".join(pieces) * times
        file.write_text(f"{json.dumps(GOOD)}\n{body}" if lines else f"[{json.dumps(GOOD)},{body}]")
        began = time.process_time()
        ids_in(file)
        return time.process_time() - began

    few, many = 2_000, 16_000
    assert seconds(many) < 5 * many / few * max(seconds(few), 0.01)


@pytest.mark.attack("12")
@pytest.mark.parametrize("form", ["list", "lines"])
def test_good_rows_among_broken_ones_are_all_found(file, monkeypatch, form):
    """After an error values are cut out one by one; the rows are the same for every chunk size."""
    parts = [json.dumps(good(f"r{i}")) if i % 3 else BROKEN[list(BROKEN)[i % 7]] for i in range(1, 60)]
    file.write_text("[" + ",\n".join(parts) + "]" if form == "list" else "\n".join(parts))
    for chunk in (1, 2, 7, 64, 1000, 1 << 20):
        monkeypatch.setattr(json_text, "CHUNK", chunk)
        assert ids_in(file)[0] == [f"r{i}" for i in range(1, 60) if i % 3]


@pytest.mark.attack("15")
@pytest.mark.parametrize("number", ["1" * 100_000, "-" + "9" * 5000, "1e" + "9" * 5000, "0." + "1" * 100_000, "NaN"])
def test_numbers_without_end_cost_at_most_their_row(file, number):
    for row in (number, f'{{"id": {number}, "conversations": []}}', f'{{"instruction": "a", "output": {number}}}'):
        for text in (f"[{json.dumps(good('r0'))},{row},{json.dumps(good('r1'))}]",
                     f"{json.dumps(good('r0'))}\n{row}\n{json.dumps(good('r1'))}"):  # fmt: skip
            file.write_text(text)
            ids, _ = ids_in(file)
            assert (ids[0], ids[-1]) == ("r0", "r1")


# --- cut files ---------------------------------------------------------------------------------------------


def test_a_list_cut_anywhere_keeps_every_whole_row_and_says_so(file):
    rows = [sharegpt_row(f"r{i}", *TALK) | {"n": 12, "ok": True} for i in range(3)]
    whole = json.dumps(rows, indent=1)
    ends = list(itertools.accumulate(len(json.dumps(row, indent=1)) for row in rows))
    for cut in range(len(whole)):
        file.write_text(whole[:cut])
        ledger = Ledger()
        try:
            ids = [c.id for c in read(file, ledger)]
        except UserError as error:
            assert cut < ends[0] + 30
            assert "\n" not in str(error)
            continue
        assert ids == [f"r{i}" for i in range(len(ids))]
        assert ledger.lost == [
            f"data.json is cut off or damaged after {len(ids)} whole rows; what follows could not be read"
        ]
        adds_up(ledger)
    assert len(ids) == 3


@pytest.mark.parametrize(("cut", "rows"), [("in a string", 2), ("in an object", 2), ("after a comma", 2)])
def test_kinds_of_cuts(file, cut, rows):
    whole = json.dumps([good(f"r{i}") for i in range(3)])
    third = whole.rindex('{"id"')
    ends = {"in a string": whole.rindex("llo!"), "in an object": third + 12, "after a comma": third}
    file.write_text(whole[: ends[cut]])
    ids, ledger = ids_in(file)
    assert len(ids) == rows
    assert "after 2 whole rows" in ledger.lost[0]


def test_lines_cut_in_the_last_line(file):
    whole = "\n".join(json.dumps(good(f"r{i}")) for i in range(3))
    file.write_text(whole[:-20])
    ids, ledger = ids_in(file)
    assert ids == ["r0", "r1"]
    assert ledger.dropped["row is not valid JSON"].first == ["data.json line 3"]


def test_pretty_objects_cut_in_the_last(file):
    whole = "\n".join(json.dumps(good(f"r{i}"), indent=1) for i in range(3))
    file.write_text(whole[:-20])
    ids, ledger = ids_in(file)
    assert ids == ["r0", "r1"]
    assert "cut off or damaged after 2 whole rows" in ledger.lost[0]


def test_text_after_the_end_of_the_list_is_said_to_be_lost(file):
    file.write_text(json.dumps([good("a")]) + json.dumps([good("b")]))
    ids, ledger = ids_in(file)
    assert ids == ["a"]
    assert "has more text after its list of 1 rows" in ledger.lost[0]


# --- what people write and others refuse --------------------------------------------------------------------


@pytest.mark.attack("16")
@pytest.mark.parametrize("indent", [None, 1])
def test_rows_that_end_in_a_comma_are_read_and_counted(file, indent):
    file.write_text(",\n".join(json.dumps(good(f"r{i}"), indent=indent) for i in range(3)) + ",\n")
    ids, ledger = ids_in(file)
    assert ids == ["r0", "r1", "r2"]
    assert (ledger.repaired[read_files.COMMA].rows, ledger.dropped) == (3, {})


def packed(how, data):
    if how == "gz":
        return gzip.compress(data)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.attack("16")
@pytest.mark.parametrize("how", ["gz", "zst"])
@pytest.mark.parametrize("form", [name for name in FORMS if "strings" not in name])
def test_compressed_files_are_read(tmp_path, form, how):
    (tmp_path / f"data.json.{how}").write_bytes(packed(how, FORMS[form]))
    for path in (tmp_path, tmp_path / f"data.json.{how}"):  # in a folder as well
        ids, ledger = ids_in(path)
        assert ids == ["a", "b"]
        assert (ledger.dropped, ledger.lost) == ({}, [])


@pytest.mark.attack("16")
@pytest.mark.parametrize("how", ["gz", "zst"])
def test_compressed_files_that_are_cut_keep_what_is_whole(tmp_path, how):
    rows = [sharegpt_row(f"r{i}", ("human", os.urandom(3000).hex()), ("gpt", "ok")) for i in range(300)]
    whole = packed(how, "\n".join(map(json.dumps, rows)).encode())
    file = tmp_path / f"data.jsonl.{how}"
    file.write_bytes(whole[: len(whole) // 2])
    ids, ledger = ids_in(file)
    assert 20 < len(ids) < 290
    assert ids == [f"r{i}" for i in range(len(ids))]
    assert "cut off or damaged" in ledger.lost[0]


@pytest.mark.attack("12")
def test_a_decompression_bomb_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("minisft.data.data_files._LEAST", 1 << 20)
    file = tmp_path / "bomb.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(GOOD).encode() + b"\n" + b'{"a": "' + b"x" * (64 << 20)))
    tracemalloc.start()
    ids, ledger = ids_in(file)
    assert tracemalloc.get_traced_memory()[1] < 40_000_000
    tracemalloc.stop()
    assert ids == ["a"]
    assert "unpacks to more than" in ledger.lost[0]


@pytest.mark.attack("12")
@pytest.mark.parametrize("what", ["values", "bytes"])
def test_a_parquet_file_cannot_claim_more_than_it_holds(tmp_path, what):
    """Parquet stores five million nulls, or one repeated letter, in a few bytes."""
    count = 5_000_000
    nulls = pyarrow.ListArray.from_arrays(pyarrow.array([0, count], pyarrow.int32()), pyarrow.nulls(count))
    columns = (
        {"input_ids": nulls, "labels": nulls} if what == "values" else {"prompt": ["a" * 4 * count], "answer": [""]}
    )
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet", compression="zstd")
    refused(tmp_path / "x.parquet", "damaged Parquet .* cannot hold")


def test_a_compressed_table_is_refused(tmp_path):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    (tmp_path / "x.parquet.gz").write_bytes(packed("gz", sink.getvalue().to_pybytes()))
    with pytest.raises(UserError, match="compressed Parquet: unpack it"):
        list(read(tmp_path / "x.parquet.gz", Ledger()))


SPEAKING = [("How do I show a less-than sign?", "Write &lt; in the HTML source."), ("And?", "It is &quot; or &amp;.")]
ESCAPED = [
    ("Fix &lt;p&gt;this", "&lt;p&gt;this&lt;/p&gt;"),
    ("Is 1 &lt; 2?", "It&#39;s so."),
    ("Say &quot;yes&quot;", "AT&amp;T"),
]


@pytest.mark.attack("16")
@pytest.mark.parametrize(
    ("talks", "undone"),
    [
        (SPEAKING, 0),
        (SPEAKING * 50, 0),
        (ESCAPED, 3),
        (ESCAPED[:1], 0),  # too little to tell
        ([("How do I write bold?", "Write &lt;b&gt; in the source.")] * 9, 0),  # one kind of entity is too little, too
        (ESCAPED + SPEAKING * 9, 0),  # most entities are only mentioned
        ([*ESCAPED, ("What is <b>?", "&lt;b&gt; in source")], 0),  # a plain < shows that the file was not escaped
        (ESCAPED * 50 + [("What is <b>?", "&lt;b&gt; in source")], 150),  # a file merged from several sources
        ([("x", "y")] * 2000 + ESCAPED * 9, 0),  # the first rows decide
        (ESCAPED * 9 + SPEAKING, 9 * 3 + 2),  # in an escaped file every entity was a character
    ],
)
def test_html_is_unescaped_by_what_the_whole_file_shows(file, talks, undone):
    rows = [sharegpt_row(f"r{i}", ("human", q), ("gpt", a)) for i, (q, a) in enumerate(talks)]
    file.write_text("\n".join(map(json.dumps, rows)))
    ledger = Ledger()
    found = list(read(file, ledger))
    assert ledger.repaired["HTML-escaped text: unescaped"].rows == undone
    if not undone:
        assert [c.messages[1].content for c in found] == [answer for _, answer in talks]
    else:
        assert [c.messages[1].content for c in found[:3]] == ["<p>this</p>", "It's so.", "AT&T"]


# --- bytes and characters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["list", "lines"])
@pytest.mark.parametrize("at", [0, 1])
def test_invalid_utf8_is_replaced_and_counted(file, form, at):
    parts = [json.dumps(good(f"r{i}")).encode() for i in range(2)]
    parts[at] = parts[at].replace(b"Hello!", b"Hel\xff\xc3lo\xed\xa0\x80!")
    file.write_bytes(b"[" + b",".join(parts) + b"]" if form == "list" else b"\n".join(parts))
    ledger = Ledger()
    found = list(read(file, ledger))
    assert [c.id for c in found] == ["r0", "r1"]
    assert found[at].messages[1].content == "Hel\N{REPLACEMENT CHARACTER}lo\N{REPLACEMENT CHARACTER}!"
    assert ledger.repaired["invalid UTF-8: replaced"].first == [f"r{at}"]


@pytest.mark.parametrize("form", ["list", "lines"])
def test_half_a_surrogate_pair_is_replaced_and_counted(file, form):
    bad = json.dumps(good("r0")).replace("Hello!", r"Hello\ud83d!")
    whole = json.dumps(good("r1")).replace("Hello!", r"Hello\ud83d\ude42!")
    file.write_text(f"[{bad},{whole}]" if form == "list" else f"{bad}\n{whole}")
    ledger = Ledger()
    first, second = read(file, ledger)
    assert (first.messages[1].content, second.messages[1].content) == ("Hello?!", "Hello🙂!")
    assert ledger.repaired["half a surrogate pair: replaced"].first == ["r0"]


def test_a_character_across_two_chunks_stays_whole(file, monkeypatch):
    monkeypatch.setattr(json_text, "CHUNK", 7)
    file.write_text(json.dumps([sharegpt_row("a", ("human", "é🙂" * 50), ("gpt", "ok"))], ensure_ascii=False))
    (found,) = read(file, Ledger())
    assert found.messages[0].content == "é🙂" * 50


def test_crlf_in_texts(file):
    file.write_text(json.dumps([sharegpt_row("a", ("human", "a\r\nb"), ("gpt", "ok"))]))
    assert list(ids_in(file)[1].repaired) == ["CR or CRLF line endings: converted to LF"]


# --- ids ---------------------------------------------------------------------------------------------------


def test_ids_that_come_again_are_numbered(file):
    file.write_text(json.dumps([good("a"), good("a"), good("a#2"), good("a"), good("a#2"), good("b")]))
    ids, ledger = ids_in(file)
    assert ids == ["a", "a#2", "a#2#2", "a#3", "a#2#3", "b"]
    assert ledger.repaired["id seen before: numbered"].rows == 4


def test_one_id_for_all_rows_costs_linear_time(file):
    file.write_text("\n".join([json.dumps(good("x"))] * 20_000))
    began = time.perf_counter()
    assert len(ids_in(file)[0]) == 20_000
    assert time.perf_counter() - began < 10


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        ("   \n", "is empty"),
        ("\ufeff", "is empty"),
        ("hello", "is not JSON"),
        ("\x1f\x8b compressed", "is not JSON"),
        ("[1, 2", r"row is not an object \(2\)"),
        ("[", "no whole row"),
        ("[{]", "no whole row"),
        ('[{"id": "a", "conversations": [{"from": "hum', "no whole row"),
        ("{oops", "row is not valid JSON"),
        ('{"data": [\n{"id": 1},\n', "row is not valid JSON"),
        ("[]", "no rows"),
        ("{}", "row of an unknown shape"),
        ('{"data": []}', "row of an unknown shape"),
        (json.dumps({"train": [GOOD], "test": [GOOD]}), "several lists of rows, under the keys train, test"),
        (json.dumps({"train": [GOOD], "te\x1b[31m": [GOOD]}, indent=1), r"under the keys train, te\\x1b\[31m"),
        (json.dumps([{"text": "Hi", "n": 1}]), "row of an unknown shape"),
        (json.dumps([{"evil\x1b[31m\nkey": 1}]), "row of an unknown shape"),
        (json.dumps([sharegpt_row("a", ("human", "Hi"))]), "no question with an answer"),
        (json.dumps([sharegpt_row("a", (f"role {i}", "Hi")) for i in range(99)]), "unknown role 'role 0'"),
        ("PAR1 but not really", "damaged Parquet"),
    ],
)
def test_a_file_without_a_usable_row_is_refused_in_one_sentence(file, content, says):
    file.write_text(content)
    with pytest.raises(UserError, match=says) as error:
        list(read(file, Ledger()))
    assert "\n" not in str(error.value)
    assert "data.json" in str(error.value)
    assert len(str(error.value)) < 600


def test_paths_that_hold_no_data_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        list(read(tmp_path / "none.json", Ledger()))
    with pytest.raises(UserError, match=r"no \.json, \.jsonl or \.parquet"):
        list(read(tmp_path, Ledger()))


@pytest.mark.parametrize("form", ["list", "lines", "broken lines"])
def test_a_huge_file_of_the_wrong_shape_is_refused_early(file, form):
    row = json.dumps({"text": "word " * 20, "n": 1}) if form != "broken lines" else '{"text": oops'
    with file.open("w") as stream:
        stream.write("[" * (form == "list"))
        for _ in range(50):
            stream.write((row + (",\n" if form == "list" else "\n")) * 2000)
    ledger = Ledger()
    with pytest.raises(UserError, match="in its first 1,000 rows"):
        list(read(file, ledger))
    assert ledger.stages["raw"].rows == PATIENCE


def test_many_unusable_rows_after_a_usable_one_are_read_on(file):
    file.write_text("\n".join([json.dumps(GOOD), *["{}"] * (2 * PATIENCE), json.dumps(good("z"))]))
    assert ids_in(file)[0] == ["a", "z"]


# --- files and folders of others -----------------------------------------------------------------------------


def refused(path, says, seconds=10):
    began = time.perf_counter()
    with pytest.raises(UserError, match=says) as error:
        list(read(path, Ledger()))
    assert time.perf_counter() - began < seconds
    assert "\n" not in str(error.value)


@pytest.mark.attack("15")
def test_what_is_no_regular_file_is_refused_and_waits_for_nobody(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", Path("/dev/zero"), Path("/dev/null")):
        refused(path, "give a regular file")
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    refused(tmp_path / "loop.json", "cannot be read")
    refused(tmp_path, "no .json")  # neither counts as a data file
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "a.json").write_text(json.dumps([GOOD]))
    ids, ledger = ids_in(tmp_path)
    assert ids == ["a"]
    assert ledger.notes == ["files in the folder that were not read: 2 (loop.json, pipe.json)"]


@pytest.mark.attack("15")
def test_a_file_that_cannot_be_read_or_disappears_is_said(tmp_path, monkeypatch):
    files = [tmp_path / f"{name}.json" for name in "ab"]
    for file in files:
        file.write_text(json.dumps([good(file.stem)]))
    rows = rows_of(tmp_path, Ledger())
    next(rows)
    files[1].unlink()
    with pytest.raises(UserError, match="does not exist"):
        list(rows)
    files[1].write_text("x")

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("minisft.data.data_files.os.open", denied)
    refused(tmp_path, "cannot be read .Permission denied")


@pytest.mark.attack("15")
def test_a_disk_that_fails_is_said():
    """`/proc/self/mem` opens as a regular file, but its first byte cannot be read."""
    file = DataFile(Path("/proc/self/mem"), "mem")
    with pytest.raises(UserError, match=r"cannot be read .*copy it again"):
        _Plain(os.open(file.path, os.O_RDONLY), file).readinto(bytearray(9))


@pytest.mark.attack("15")
def test_names_that_are_not_utf8_or_move_the_cursor(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xff\x1b[31m"))
    folder.mkdir()
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "ok"}]}
    for name in (b"l\xff.jsonl", b"l\xfe.json", b"o\x1b[31m.txt"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_text(json.dumps(row))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "p.parquet")
    (tmp_path / "p.parquet").rename(Path(os.fsdecode(os.fsencode(folder) + b"/p\xff.parquet")))
    ids, ledger = ids_in(folder)
    assert ids == [r"l\xfe.json line 1", r"l\xff.jsonl line 1", r"p\xff.parquet row 0"]
    assert ledger.notes == [r"files in the folder that were not read: 1 (o\x1b[31m.txt)"]


@pytest.mark.attack("16")
def test_hidden_files_are_left_out_and_other_endings_read(tmp_path):
    for name in (".ipynb_checkpoints/a-checkpoint.jsonl", "._a.jsonl", "a.JSONL", "b.ndjson", "sub/c.Json", "d.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(good(Path(name).stem)))
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(json.dumps(good("e")).encode()))
    ids, ledger = ids_in(tmp_path)
    assert ids == ["a", "b", "e", "c"]
    names = "._a.jsonl, .ipynb_checkpoints/a-checkpoint.jsonl, d.csv"
    assert ledger.notes == [f"files in the folder that were not read: 3 ({names})"]


@pytest.fixture
def saved(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list([good(f"r{i}") for i in range(9)])
    datasets.DatasetDict({"train": rows, "test": rows.select(range(2))}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_conversations_saved_to_disk_are_read(saved):
    assert ids_in(saved / "train")[0] == [f"r{i}" for i in range(9)]
    ids, ledger = ids_in(saved)
    assert len(ids) == 11
    assert ledger.notes == [
        "all splits of the saved data set are read (train, test): give the folder of one to read only that"
    ]
    assert ids_in(saved / "train")[1].notes == []
    (saved / "dataset_dict.json").unlink()  # a folder of such folders, as in the hub's cache
    assert len(ids_in(saved)[0]) == 11


HOSTILE = [
    "", "null", "[]", "{}", '"x"', "3", "[" * 5000, "{" * 9, "1" * 5000, '{"_data_files": 3}', '{"_data_files": [{}]}',
    '{"_data_files": ["x"]}', '{"_data_files": [{"filename": null}]}', '{"_data_files": [{"filename": 3}]}',
    *(json.dumps({"_data_files": [{"filename": name}]}) for name in (
        "../train/x.arrow", "/etc/passwd", "..", ".", "", "a/b", "none.arrow", "\0", "\ud800", "x\x1b[31m",
    )),
]  # fmt: skip


@pytest.mark.attack("15")
@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:40])
def test_saved_folders_of_others_name_only_files_of_their_own(saved, text):
    (saved / "train" / "state.json").write_text(text)
    for path in (saved, saved / "train"):
        refused(path, "incomplete|does not exist|no usable conversation|cannot be read")
    (saved / "dataset_dict.json").write_text(text.replace("_data_files", "splits"))
    refused(saved, "incomplete")
    for splits in ([".."], ["."], ["/tmp"], ["train/../test"], [3], "train", [["train"]], ["none"]):
        (saved / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
        refused(saved, "incomplete")


# --- damage of every kind of file ------------------------------------------------------------------------------


@pytest.mark.attack("15")
@pytest.mark.parametrize("kind", mutations.KINDS)
def test_damage_at_random_ends_in_rows_or_in_a_sentence(tmp_path, kind):
    """In a separate process, because damaged Arrow used to crash it; see `tests/mutations.py` for more."""
    words = [sys.executable, "-P", mutations.__file__, kind, "3", "120", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "120 files" in done.stdout


def of_nothing(values, lists=None):
    """An array of nulls, or of `lists` lists of nulls, which takes no space."""
    nulls = pyarrow.Array.from_buffers(pyarrow.null(), values, [None])
    if not lists:
        return nulls
    offsets = pyarrow.array([0, values], pyarrow.int32()).buffers()[1]
    return pyarrow.Array.from_buffers(pyarrow.list_(pyarrow.null()), lists, [None, offsets], children=[nulls])


@pytest.mark.attack("15")
@pytest.mark.parametrize("column", ["input_ids", "messages", "other"])
@pytest.mark.parametrize("lists", [None, 1])
def test_a_table_cannot_claim_more_than_it_holds(tmp_path, column, lists):
    """Two billion nulls take no space in the file, but would fill the memory."""
    claims = pyarrow.RecordBatch.from_arrays([of_nothing((1 << 31) - 1, lists)], names=[column])
    with pyarrow.ipc.new_stream(tmp_path / "x.arrow", claims.schema) as writer:
        writer.write_batch(claims)
    refused(
        tmp_path / "x.arrow", "damaged Arrow .* cannot hold" if (column, lists) != ("other", 1) else "unknown shape"
    )
    fine = pyarrow.RecordBatch.from_pylist([good("a") | {"tools": [], "chosen": [[]], "images": None}] * 300)
    with pyarrow.ipc.new_file(tmp_path / "x.arrow", fine.schema) as writer:
        writer.write_batch(fine)
    assert len(ids_in(tmp_path / "x.arrow")[0]) == 300


# --- nothing is lost without a line ------------------------------------------------------------------------


@settings(max_examples=60)
@given(rows=st.lists(any_rows, max_size=6), lines=st.booleans())
def test_rows_in_are_rows_kept_plus_rows_dropped(tmp_path_factory, rows, lines):
    file = tmp_path_factory.mktemp("any") / "data.json"
    rows = [GOOD, *rows]
    file.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    _, ledger = ids_in(file)
    assert ledger.stages["raw"].rows == len(rows)
    assert ledger.lost == []


@settings(max_examples=100)
@given(garbage=st.binary(max_size=40), at=st.integers(0, 200), lines=st.booleans())
def test_any_damage_is_survived_or_refused_in_one_sentence(tmp_path_factory, garbage, at, lines):
    file = tmp_path_factory.mktemp("any") / "data.json"
    rows = [good(f"r{i}") for i in range(3)]
    whole = ("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)).encode()
    file.write_bytes(whole[:at] + garbage + whole[at + len(garbage) // 2 :])
    ledger = Ledger()
    try:
        ids = [c.id for c in read(file, ledger)]
    except UserError as error:
        assert "\n" not in str(error)
    else:
        adds_up(ledger)
        assert len(ids) <= 3 or ledger.repaired


@pytest.mark.model
def test_the_packaged_sharegpt_is_read_to_its_last_whole_conversation():
    from minisft.data.download import find_data
    from minisft.data.splits import origin, split

    ledger = Ledger()
    conversations = list(read(find_data().path, ledger))
    assert ledger.stages["raw"].rows == 17_671
    assert ledger.stages["cleaned"].rows == len(conversations)
    adds_up(ledger)
    assert ledger.dropped["empty conversation"].rows == 126
    assert ledger.repaired["answer before any question: removed"].rows == 6_358
    assert "17,671 whole rows" in ledger.lost[0]
    train, test = split(conversations, ledger=ledger)
    leaked = ledger.dropped["test: its first question is in train too"].rows
    assert len(test) + leaked == round(0.1 * len(conversations))
    assert len(train) + len(test) + leaked == len(conversations)
    assert {origin(c.id) for c in train}.isdisjoint(origin(c.id) for c in test)


@pytest.mark.attack("16")
@pytest.mark.parametrize("form", ["list", "lines", "objects", "after damage"])
def test_a_row_with_a_key_twice_is_dropped_and_counted(tmp_path, form):
    twice = json.dumps(good("twice")).replace('"id"', '"conversations": [], "id"')
    rows = [json.dumps(good("a")), twice, json.dumps(good("b"))]
    if form == "after damage":
        rows.insert(0, '{"id": tru}')
    if form == "objects":
        text = "\n".join(json.dumps(json.loads(row), indent=1) if row != twice else row for row in rows)
    else:
        text = "\n".join(rows) if form == "lines" else f"[{','.join(rows)}]"
    (tmp_path / "rows.json").write_text(text)
    ledger = Ledger()
    assert [c.id for c in read(tmp_path / "rows.json", ledger)] == ["a", "b"]
    assert ledger.dropped["row has a key twice"].rows == 1


@pytest.mark.attack("16")
def test_other_collections_beside_the_rows_are_named(tmp_path):
    for name, more in (("some", {"version": "1", "more": {"0": GOOD}, "empty": []}), ("none", {"version": "1"})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"data": [GOOD], **more}))
        ledger = Ledger()
        assert len(list(read(tmp_path / f"{name}.json", ledger))) == 1
        named = ["some.json: the rows are those of the key data; other keys that were not read: more, empty"]
        assert ledger.notes == (named if name == "some" else [])
    for rows in ([GOOD, None], [json.dumps(GOOD)], [GOOD["conversations"]]):
        (tmp_path / "two.json").write_text(json.dumps({"train": rows, "rejected": [GOOD]}))
        with pytest.raises(UserError, match="several lists of rows, under the keys train, rejected"):
            list(read(tmp_path / "two.json", Ledger()))
    lines = [
        f'"train": [{json.dumps(GOOD)},\n{json.dumps(GOOD)}]',
        f'"rejected": [{json.dumps(GOOD)}]',
        '"v": 1, "v": 2',
    ]
    (tmp_path / "twice.json").write_text("{" + ",\n".join(lines) + "}")
    with pytest.raises(UserError, match="row has a key twice"):
        list(read(tmp_path / "twice.json", Ledger()))
    (tmp_path / "text.json").write_text(json.dumps([json.dumps(GOOD)[:-1] + ', "weight": 0, "weight": 1}', GOOD]))
    ledger = Ledger()
    assert len(list(read(tmp_path / "text.json", ledger))) == 1
    assert ledger.dropped["row has a key twice"].rows == 1


@pytest.mark.attack("9")
@pytest.mark.parametrize("how", ["whole", "cut", "two"])
def test_an_arrow_stream_ends_where_its_file_ends(tmp_path, how):
    import pyarrow

    table = pyarrow.Table.from_pylist([good(f"r{i}") for i in range(4)])
    # The last values of the last batch look like the mark of a stream's end.
    table = table.append_column("n", pyarrow.array([0, 0, -1, 0], pyarrow.int32()))
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    stream = sink.getvalue().to_pybytes()
    content = {"whole": stream, "cut": stream[:-8], "two": stream * 2}[how]
    (tmp_path / "rows.arrow").write_bytes(content)
    ledger = Ledger()
    assert len(list(read(tmp_path / "rows.arrow", ledger))) == 4
    said = {"whole": "", "cut": "is cut off after 4 rows", "two": "has more data, which was not read, after 4 rows"}
    assert " ".join(ledger.lost).removeprefix("rows.arrow ") == said[how]


@pytest.mark.attack("16")
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_two_columns_of_one_name_are_refused(tmp_path, kind):
    column = pyarrow.array([good("a")["conversations"], good("b")["conversations"]])
    table = pyarrow.Table.from_arrays([column, column], names=["messages", "messages"])
    file = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(UserError, match="two of its columns are called messages"):
        list(read(file, Ledger()))


@pytest.mark.attack("6")
def test_linked_folders_are_named_and_unreadable_ones_refused(tmp_path, monkeypatch):
    elsewhere, data = tmp_path / "elsewhere", tmp_path / "data"
    for folder in (elsewhere, data / "closed"):
        folder.mkdir(parents=True)
        (folder / "rows.json").write_text(json.dumps([GOOD]))
    (data / "link").symlink_to(elsewhere)
    ledger = Ledger()
    assert len(list(read(data, ledger))) == 1
    assert ledger.notes == ["files in the folder that were not read: 1 (link)"]
    real = os.scandir

    def closed(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match=r"closed cannot be read \(Permission denied\)"):
        list(read(data, Ledger()))


@pytest.mark.attack("9")
@pytest.mark.parametrize(
    ("suffix", "pack"), [("zst", lambda b: pyarrow.compress(b, "zstd", asbytes=True)), ("gz", gzip.compress)]
)
def test_a_byte_after_the_end_of_a_compressed_file_adds_no_rows(tmp_path, suffix, pack):
    """A stream that failed may return its undecoded buffer when it is read again."""
    lines = "".join(json.dumps(good(f"r{i}")) + "\n" for i in range(20_000)).encode()
    file = tmp_path / f"rows.jsonl.{suffix}"
    file.write_bytes(pack(lines) + b"\n")
    ledger = Ledger()
    ids = [conversation.id for conversation in read(file, ledger)]
    assert len(ids) == len(set(ids)) <= 20_000
    assert len(ids) > 19_000 or ledger.lost
    assert len(ledger.lost) <= 1
