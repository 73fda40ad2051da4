"""Columns with other names, templates over a row, nulls, and columns that are ignored or not used."""

import math

import pytest

from jobs.data.formats import check_fields, convert, detect_format, unused_columns
from jobs.tokenization.conversation import Sample, Turn

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
CHAT = [USER, ANSWER]
NAN = math.nan


def read(row: dict, fields: dict | None = None, **settings) -> Sample:
    return convert(row, detect_format(row, fields, settings.get("ignore", ()))[0], fields, **settings)


def texts(row: dict, fields: dict | None = None, **settings) -> list[str]:
    sample = read(row, fields, **settings)
    return [turn.content for turn in sample.turns] or [text for text, _ in sample.parts]


@pytest.mark.parametrize(
    ("row", "fields", "expected"),
    [
        # NaN is null
        ({"instruction": "a", "input": NAN, "output": "b"}, None, ["a", "b"]),
        ({"messages": CHAT, "system": NAN, "tools": NAN}, None, ["Hi", "Hello!"]),
        ({"messages": [USER, {**ANSWER, "name": NAN, "weight": NAN, "tool_calls": NAN}]}, None, ["Hi", "Hello!"]),
        ({"d": {"q": "a", "r": NAN}, "o": "b"}, {"instruction": "d.q", "input": "d.r", "output": "o"}, ["a", "b"]),
        # a null column is empty in a template, however it is written
        ({"q": "a", "c": None, "o": "b"}, {"instruction": "{{ q }} {{ c }}", "output": "o"}, ["a ", "b"]),
        ({"q": "a", "c": NAN, "o": "b"}, {"instruction": "{{ q }}{{ c }}", "output": "o"}, ["a", "b"]),
        ({"q": "a", "c": None, "o": "b"}, {"instruction": "{{ q ~ c ~ (c | string) }}", "output": "o"}, ["a", "b"]),
        ({"q": "a", "c": {"d": None}, "o": "b"}, {"instruction": "{{ q ~ c.d }}", "output": "o"}, ["a", "b"]),
        ({"q": "a", "c": [None, "x"], "o": "b"}, {"instruction": "{{ q }}{{ c | join('-') }}", "output": "o"}, ["a-x", "b"]),
        ({"q": "a", "c": None, "o": "b"}, {"instruction": "{{ q }}{% if c is none %}!{% endif %}", "output": "o"}, ["a!", "b"]),
        ({"q": "a", "c": None, "o": "b"}, {"instruction": "{{ q }}{% if c %}!{% endif %}", "output": "o"}, ["a", "b"]),
        ({"q": "a", "c": [1, None], "o": "b"}, {"instruction": "{{ q }} {{ c | tojson }}", "output": "o"}, ["a [1, null]", "b"]),
        # so is a column that the row lacks
        ({"q": "a", "o": "b"}, {"instruction": "{{ q }} {{ c }}", "output": "o"}, ["a ", "b"]),
        ({"q": "a", "o": "b"}, {"instruction": "{{ q }}{% if c is defined %}!{% endif %}", "output": "o"}, ["a", "b"]),
        ({"q": "a", "o": "b"}, {"instruction": "{{ q }} {{ c | default('none') }}", "output": "o"}, ["a none", "b"]),
        # a template of null columns alone is null
        ({"messages": CHAT, "rule": None}, {"messages": "messages", "system": "Rule: {{ rule }}"}, ["Hi", "Hello!"]),
        # an optional column that this row lacks is null
        ({"chat": CHAT}, {"messages": "chat", "system": "sys", "tools": "t"}, ["Hi", "Hello!"]),
        # the other columns stay
        ({"chat": CHAT, "system": "Be kind."}, {"messages": "chat"}, ["Be kind.", "Hi", "Hello!"]),
        ({"question": "a", "context": "c", "reply": "b"}, {"output": "reply"}, ["a\nc", "b"]),
        # but a mapped column wins over the row's own of that name, and over its other names
        ({"title": "a", "instruction": "x", "prompt": "y", "output": "b"}, {"instruction": "title"}, ["a", "b"]),
        ({"instruction": "a", "output": "x", "response": "y", "best": "b"}, {"output": "best"}, ["a", "b"]),
        # nothing is read twice
        ({"input": "a", "output": "b"}, {"instruction": "input"}, ["a", "b"]),
        ({"instruction": "a", "input": "c", "output": "b"}, {"instruction": "{{ instruction }}: {{ input }}"}, ["a: c", "b"]),
        # the mapped columns decide the format
        ({"title": "a", "body": "b", "messages": CHAT}, {"instruction": "title", "output": "body"}, ["a", "b"]),
        ({"page": "a", "instruction": "x", "output": "y"}, {"text": "page"}, ["a"]),
        ({"q": "a", "o": "b", "input_ids": [1]}, {"prompt": "q", "completion": "o"}, ["a", "b"]),
        # nested columns; a column whose name has a dot wins
        ({"data": {"chat": CHAT}, "id": 3}, {"messages": "data.chat"}, ["Hi", "Hello!"]),
        ({"a.b": "c", "a": {"b": "x"}}, {"text": "a.b"}, ["c"]),
        # \n is typed as two characters in a shell
        ({"a": "1", "b": "2"}, {"text": r"{{ a }}\n{{ b }}"}, ["1\n2"]),
        ({"a": "1", "b": "2"}, {"text": r"{{ a }}\\n{{ b }}"}, [r"1\n2"]),
        ({"a": ["1", "2"]}, {"text": r"\n{{ a | join('\n') }}"}, ["\n1\n2"]),
        ({"a": r"1\n2"}, {"text": "{{ a }}"}, [r"1\n2"]),
    ],
)  # fmt: skip
def test_columns_are_mapped_and_nulls_are_empty(row, fields, expected) -> None:
    assert texts(row, fields) == expected


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ({"instruction": "a", "output": NAN}, None, "no known format .* instruction, output where output is null"),
        ({"messages": {"role": ["user"], "content": ["a"]}}, None, "messages is an object, not a list: give a list"),
        ({"a": "x", "b": "y"}, {"txet": "a"}, r"data\.fields\.txet is neither a column of a format .* nor a key"),
        ({"q": "a", "o": "b"}, {"text": "q", "output": "o"}, "columns of different formats .text, output."),
        (
            {"q": "a", "o": "b"},
            {"messages": "q"},
            r"no format that has messages \(data.fields\) fits .* data.sets.NAME.fields",
        ),
        (
            {"q": None, "o": "b"},
            {"text": "{{ q }}!"},
            "no format that has text .* where text is null: correct data.fields",
        ),
        ({"a": []}, {"text": "{{ a[0] }}"}, "text cannot be rendered: list object has no element 0; columns: a"),
        ({"a": {"b": 1}}, {"text": "{{ a.c }}"}, "text cannot be rendered: .*has no attribute 'c'"),
        (
            {"a": ["x"]},
            {"text": "{{ a }}"},
            r"text cannot be rendered: a list is not text: choose an item such as \[0\]",
        ),
        (
            {"a": {"b": "x"}},
            {"text": "{{ a }}"},
            "text cannot be rendered: an object is not text: choose one of its keys",
        ),
        ({"a": ["x"]}, {"text": "{{ a ~ '' }}"}, "a list is not text"),
        ({"a": "x"}, {"text": "{{ a"}, "text cannot be rendered: "),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused(row, fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        read(row, fields)


@pytest.mark.parametrize("template", ["{{ a[0] }}", "{{ a | join(', ') }}", "{{ a | tojson }}"])
def test_a_list_can_be_written_in_the_ways_that_the_message_names(template) -> None:
    assert texts({"a": ["x"]}, {"text": template}) == ['["x"]' if "tojson" in template else "x"]


@pytest.mark.parametrize(
    ("row", "fields", "remedy", "expected"),
    [
        ({"instruction": "a", "output": ["b"]}, {}, {"output": "{{ output[0] }}"}, ["a", "b"]),
        ({"question": "a", "answer": {"text": ["b"]}}, {}, {"answer": "{{ answer['text'][0] }}"}, ["a", "b"]),
        ({"instruction": ["a"], "output": "b"}, {}, {"instruction": "{{ instruction[0] }}"}, ["a", "b"]),
        ({"prompt": ["a"], "completion": "b"}, {}, {"prompt": "{{ prompt[0] }}"}, ["a", "b"]),
        ({"question": "a", "answer": True}, {}, {"answer": "{{ 'yes' if answer else 'no' }}"}, ["a", "yes"]),
        # the names of the row's columns, not of the format's
        (
            {"question": "a", "answers": {"text": ["b"]}},
            {"output": "answers"},
            {"output": "{{ answers['text'][0] }}"},
            ["a", "b"],
        ),
        ({"question": "a", "x": {"y": ["b"]}}, {"output": "x.y"}, {"output": "{{ x.y[0] }}"}, ["a", "b"]),
        (
            {"messages": CHAT, "meta": {"rule": "Be kind."}},
            {"system": "meta"},
            {"system": "{{ meta['rule'] }}"},
            ["Be kind.", "Hi", "Hello!"],
        ),
    ],
)
def test_a_value_that_is_no_text_is_refused_with_a_template_that_works(row, fields, remedy, expected) -> None:
    name, template = next(iter(remedy.items()))
    with pytest.raises(ValueError, match=f"{name} is .*, not text: give a text, or map it") as caught:
        read(row, fields)
    assert f'data.fields.{name}="{template}"' in str(caught.value)
    assert texts(row, {**fields, **remedy}) == expected


def test_a_column_that_no_template_can_name_has_no_such_remedy() -> None:
    with pytest.raises(ValueError, match="output is a list, not text: give a text, or drop the row"):
        read({"question": "a", "my answers": ["b"]}, {"output": "my answers"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a", "output": {}}, "output is an object, not text"),
        ({"instruction": "a", "output": []}, "output is empty"),
        ({"instruction": "a", "output": math.inf}, "output is float, not text"),
        ({"instruction": "a", "output": "b", "system": {"x": 1}}, "system is an object, not text"),
        (
            {"messages": [{"role": "user", "content": {"x": 1}}, ANSWER]},
            r"messages\[0\].content is an object, not text: give",
        ),
        ({"messages": [{"role": "user", "content": ["Hi"]}, ANSWER]}, r"messages\[0\].content is a list, not text"),
        ({"messages": [{"role": "user", "content": [{"text": "Hi"}]}, ANSWER]}, r"\[0\].content is a list, not text"),
        (
            {"messages": [{"role": "user", "content": True}, ANSWER]},
            r"messages\[0\].content is true or false, not text",
        ),
        ({"messages": [USER, {"role": "assistant", "content": NAN}]}, r"messages\[1\].content is null"),
        ({"prompt": [{"role": "user", "content": "a"}], "response": ["a", "b"]}, "response is a list, not text"),
    ],
)
def test_a_list_or_an_object_is_not_made_a_text(row, message) -> None:
    with pytest.raises(ValueError, match=message):
        read(row)


def test_numbers_are_texts_and_results_of_tools_may_be_json() -> None:
    assert texts({"question": "6 * 7?", "answer": 42}) == ["6 * 7?", "42"]
    for content in ({"sum": 2}, [1, 2], True):
        turns = read({"messages": [USER, ANSWER, {"role": "tool", "content": content}, ANSWER]}).turns
        assert turns[2].content in ('{"sum": 2}', "[1, 2]", "true")


@pytest.mark.parametrize(
    ("row", "format", "fields"),
    [
        ({"prompt": [USER], "response": "Hello!"}, "alpaca", None),
        ({"input": [USER], "output": "Hello!"}, "auto", {"prompt": "input"}),
        ({"instruction": "Hi", "output": [ANSWER]}, "auto", {"prompt": "instruction", "completion": "output"}),
        ({"instruction": [USER], "output": "Hello!"}, "auto", {"prompt": "instruction"}),
    ],
)
def test_messages_where_a_text_belongs_name_a_mapping_that_works(row, format, fields) -> None:
    remedy = r"is a list, not text: it holds messages, so set data.format=auto"
    with pytest.raises(ValueError, match=remedy) as caught:
        convert(row, detect_format(row)[0] if format == "auto" else format)
    named = [f"data.fields.{name}={source}" for name, source in (fields or {}).items()]
    together = f"data.fields={{{', '.join(f'{name}: {source}' for name, source in (fields or {}).items())}}}"
    assert together in str(caught.value) or all(name in str(caught.value) for name in named)
    assert read(row, fields).turns == (Turn("user", "Hi"), Turn("assistant", "Hello!"))


def test_a_mapped_column_that_no_row_has_is_refused_and_null_in_one_row_is_enough() -> None:
    rows = [{"chat": CHAT}, {"chat": CHAT}]
    for fields in ({"messages": "chat", "system": "sys"}, {"messages": "chat", "system": "{{ sys }}!"}):
        with pytest.raises(
            ValueError, match=r"no column sys for data.fields.system in any of the first 2 rows, which have chat"
        ):
            check_fields(rows, fields)
        check_fields([*rows, {"chat": CHAT, "sys": None}], fields)
    with pytest.raises(ValueError, match=r"no column a.c for data.fields.text in the first row"):
        check_fields([{"a": {"b": 1}}], {"text": "a.c"})
    check_fields([{"a": {"b": 1}}, {}], {"text": "a.b"})


def test_a_question_mark_behind_a_name_says_that_rows_may_lack_it() -> None:
    fields = {"messages": "chat", "system": "sys?", "train": "learn?"}
    check_fields([{"chat": CHAT}], fields)
    assert read({"chat": CHAT}, fields).turns == (Turn("user", "Hi"), Turn("assistant", "Hello!"))
    taught = [USER, {**ANSWER, "learn": False}]
    turns = (Turn("system", "Be kind."), Turn("user", "Hi"), Turn("assistant", "Hello!", train=False))
    assert read({"chat": taught, "sys": "Be kind."}, fields).turns == turns
    assert read({"chat": taught, "sys?": "Be kind."}, fields).turns == turns
    assert read({"a": {"chat": CHAT}}, {"messages": "a.chat?"}).turns == turns[1:2] + (Turn("assistant", "Hello!"),)
    with pytest.raises(ValueError, match=r'or write data.fields.system="sys\?" if rows may lack it'):
        check_fields([{"chat": CHAT}], {"messages": "chat", "system": "sys"})


def test_a_mapped_key_that_no_message_has_is_refused() -> None:
    rows = [{"chat": [USER, {**ANSWER, "learn": True}]}, {"chat": CHAT}]
    check_fields(rows, {"messages": "chat", "train": "learn"})
    with pytest.raises(ValueError, match=r"no key of a message leran for data.fields.train .* correct the name"):
        check_fields(rows, {"messages": "chat", "train": "leran"})
    check_fields([{"chat": [{**USER, "leran": None}]}], {"messages": "chat", "train": "leran"})
    check_fields([{"messages": '[{"role": "user", "content": "a", "learn": 1}]'}], {"train": "learn"})


def test_a_field_without_a_meaning_in_the_format_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.fields.output has no meaning in rows of the format text"):
        convert({"text": "a", "o": "b"}, "text", {"output": "o"})
    with pytest.raises(ValueError, match=r"data.fields.role has no meaning in rows of the format alpaca"):
        convert({"instruction": "a", "output": "b"}, "alpaca", {"role": "who"})


def test_ignored_columns_and_keys_are_as_if_the_rows_did_not_have_them() -> None:
    row = {"messages": [USER, {**ANSWER, "weight": 0}], "label": True, "system": "x", "rejected": "No."}
    sample = read(row, ignore=["label", "rejected", "weight", "system", "nowhere"])
    assert sample == Sample(turns=(Turn("user", "Hi"), Turn("assistant", "Hello!")))


@pytest.mark.parametrize(
    ("row", "fields", "expected"),
    [
        ({"id": 1, "messages": CHAT, "tools": "", "source": "x", "note": None}, None, ["id", "source"]),
        ({"instruction": "a", "prompt": "b", "input": "", "output": "c", "text": "d"}, None, ["prompt", "text"]),
        ({"a": "x", "b": "y", "c": "z"}, {"text": "{{ a }} {{ b }}"}, ["c"]),
        ({"data": {"m": CHAT}, "id": 0}, {"messages": "data.m"}, ["id"]),
        ({"prompt": "a", "completion": "b", "system": "c"}, None, ["system"]),
        ({"prompt": [USER], "completion": "b", "system": "c"}, None, []),
        ({"input_ids": [1, 2], "token_type_ids": [0, 0]}, None, ["token_type_ids"]),
        ({"text": "a", "label": 1}, None, ["label"]),
        ({"messages": CHAT, "parallel_tool_calls": True, "a": 1, "b": 2}, None, ["a"]),
    ],
)
def test_columns_that_nothing_reads_are_told(row, fields, expected) -> None:
    assert unused_columns(row, detect_format(row, fields)[0], fields, ["b"]) == expected
