"""What the quality gates find in rows, and when they stop the run."""

import json

import pytest

from conf.errors import Problem
from conf.schema_model import Gates
from jobs.data import quality_gates
from jobs.data.file_readers import Unreadable
from jobs.data.quality_gates import Findings, judge
from jobs.tokenization.conversation import EmptyText, Sample, Turn, UnknownRole

PLACEHOLDERS = [
    "{instruction}",
    "Below is a task.\n\n### Instruction:\n{instruction}\n\n### Response:",
    "Answer this: {question}",
    "<context>{context}</context>",
    '"{input}"',
    "{question}: {answer}",
    "{{ name }}",
    "Dear {{ customer.name }},",
    "{{ messages[0]['content'] | trim }}",
    "{{- user_name -}} and {{ user_name }}",
    "{{instruction}}",
    "Hello {{first_name}}!",
    "{% if input %}",
    "{%- if input -%}x{% endif %}",
    "{% for turn in turns %}",
]
NO_PLACEHOLDERS = [
    '{"instruction": "Add", "input": {"a": 1}, "output": [{"x": {}}]}',
    json.dumps({"question": "Why?", "nested": {"answer": {"text": "So."}}}, indent=2),
    r"\frac{{a}}{b} + x^{{n}} \textbf{output} \input{context} {\bf text}",
    "\\newcommand{\\foo}{% a comment\n  if it is one %}\n}",
    "\\begin{document}\\usepackage[x]{text}\\end{document}",
    "title = {{The Title}}, author = {{NASA}},",
    "int a[2][2] = {{1, 2}, {3, 4}}; int b[1][1] = {{0}}; if (x) {y();}",
    'print(f"You said {input} and {x}")',
    '"{query}".format(query=text)',
    'raise ValueError(f"{x} is not {{ name }}")',
    'echo "${HOME} ${input} ${{ github.ref }}"',
    "const {input} = props; import {context} from './context'",
    'return <Field value={input} onChange={() => set({})} />; Console.WriteLine($"{input}");',
    'app.get("/users/{user}")',
    "sets: {1, 2}, {x}, {x: y}; 100%} and {%d}",
    "no braces at all",
]


@pytest.mark.parametrize("text", PLACEHOLDERS)
def test_an_unfilled_placeholder_is_found(text) -> None:
    assert quality_gates.find_placeholder(Sample(turns=(Turn("user", "Hello"), Turn("assistant", text))))
    assert quality_gates.find_placeholder(Sample(parts=(("before", False), (text, True))))


@pytest.mark.parametrize("text", NO_PLACEHOLDERS)
def test_braces_of_json_latex_and_code_are_not_placeholders(text) -> None:
    assert quality_gates.find_placeholder(Sample(turns=(Turn("user", text),), parts=((text, True),))) is None


def test_a_placeholder_after_a_line_of_code_is_found() -> None:
    text = 'print(f"{input}")\nSummarise {document}, please.'
    assert quality_gates.find_placeholder(Sample(parts=((text, True),))) == "{document}"


def test_rows_of_tokens_have_no_placeholders() -> None:
    assert quality_gates.find_placeholder(Sample(ids=(1, 2))) is None


@pytest.mark.parametrize(
    ("error", "gate"),
    [
        (Unreadable("x"), "unreadable"),
        (UnknownRole("x"), "roles"),
        (EmptyText("x"), "empty"),
        (ValueError("x"), "unusable"),
    ],
)
def test_the_class_of_an_error_decides_its_gate(error, gate) -> None:
    assert quality_gates.gate_of(error) == gate


def listed(findings: Findings, gate: str) -> list[str]:
    """The lines under a gate's verdict."""
    (verdict,) = [verdict for verdict in judge(findings, 5000, Gates()) if verdict.gate == gate]
    return [line.strip() for line in str(verdict).splitlines()[1:]]


def test_all_rows_are_counted_and_the_first_three_of_each_reason_are_listed() -> None:
    findings = Findings()
    for number in range(25):
        findings.add("unusable", f"a:{number}", f"messages[{number}].content is null")
        findings.add("overlong", f"a:{number}", f"{number + 1:,}000 tokens")
    findings.add("unusable", "a:25", "has no output")
    assert findings.counts == {"unusable": 26, "overlong": 25}
    nulls = [f"a:{number}: messages[{number}].content is null" for number in range(3)]
    assert listed(findings, "unusable") == [*nulls, "... and 22 more with the same reason", "a:25: has no output"]
    assert listed(findings, "overlong")[2:] == ["a:2: 3000 tokens", "... and 22 more with the same reason"]


def test_many_reasons_take_bounded_memory_and_all_their_rows_are_counted() -> None:
    findings = Findings()
    words = [a + b for a in "abcdefghijklmnopqrst" for b in "abcdefghijklmnopqrst"]
    for place, word in enumerate(words * 2):
        findings.add("unusable", f"a:{place}", f"'{word}' {'x' * 10_000}")
    assert len(json.dumps(findings.to_json())) < 50_000
    lines = listed(findings, "unusable")
    assert len(lines) == 2 * quality_gates.MAX_LISTED + 1
    assert lines[0].startswith("a:0: 'aa' xxx")
    assert len(lines[0]) < 2 * quality_gates.DETAIL_LENGTH
    assert lines[-1] == f"... and {800 - 2 * quality_gates.MAX_LISTED} more"


def test_merging_adds_counts_by_reason_and_keeps_the_first_rows_in_order() -> None:
    one, other = Findings(), Findings()
    for number in range(2):
        one.add("empty", f"a:{number}", "no answer")
    for number in range(7):
        other.add("empty", f"b:{number}", "no question" if number % 2 else "no answer")
    other.add("roles", "b:9", "who?")
    before = json.dumps(other.to_json())
    one.merge(other)
    assert one.counts == {"empty": 9, "roles": 1}
    assert listed(one, "empty") == [
        *("a:0: no answer", "a:1: no answer", "b:0: no answer", "... and 3 more with the same reason"),
        *("b:1: no question", "b:3: no question", "b:5: no question"),
    ]
    assert json.dumps(other.to_json()) == before, "merging must not change the other findings"


def test_findings_come_back_from_json() -> None:
    findings = Findings()
    for number in range(5):
        findings.add("roles", f"a:{number}", "who?")
    assert Findings.from_json(json.loads(json.dumps(findings.to_json()))) == findings


def test_locations_can_be_replaced() -> None:
    findings = Findings()
    findings.add("roles", "there:1", "who?")
    assert listed(findings.with_locations(lambda location: location.replace("there", "here")), "roles") == [
        "here:1: who?"
    ]
    assert listed(findings, "roles") == ["there:1: who?"]


def test_a_gate_can_check_fewer_than_all_rows() -> None:
    findings = Findings()
    findings.add_many("duplicates", [], 0)
    findings.add_many("overlap", ["a:1", "a:2"], 30, checked=40)
    assert findings.counts == {"overlap": 30}
    (verdict,) = judge(findings, 1000, Gates())
    assert (verdict.count, verdict.rows, verdict.share, verdict.stops) == (30, 40, 0.75, True)
    assert verdict.listed() == [("a:1", ""), ("a:2", ""), ("", "... and 28 more")]


@pytest.mark.parametrize(
    ("count", "rows", "limit", "stops"),
    [
        (0, 10, 0.0, None),
        (1, 10, 0.0, True),
        (1, 20, 0.05, False),
        (2, 20, 0.05, True),
        (3, 60, 0.05, False),
        (7, 700, 0.01, False),
        (10, 10, 1.0, False),
        (30, 10, 1.0, False),  # samples of rows that were split
    ],
)
def test_a_share_above_the_limit_stops_the_run_and_one_at_the_limit_does_not(count, rows, limit, stops) -> None:
    findings = Findings()
    findings.add_many("untrained", [], count)
    assert [verdict.stops for verdict in judge(findings, rows, Gates(untrained=limit))] == [stops] * (count > 0)


def test_every_gate_has_a_limit_and_a_meaning_and_unknown_gates_are_ignored() -> None:
    assert set(quality_gates.MEANINGS) == set(vars(Gates()))
    findings = Findings()
    findings.add("split", "a:1")
    assert judge(findings, 1, Gates()) == []


def test_an_error_names_key_share_remedy_and_rows() -> None:
    findings = Findings()
    for number in range(12):
        findings.add("roles", f"rows.jsonl:{number + 1}", "turn 0.from is\n'robot'")
    (verdict,) = judge(findings, 1200, Gates())
    assert isinstance(verdict.problem, Problem)
    lines = str(verdict.problem).splitlines()
    assert lines[0] == (
        "data.gates.roles=0: 12 of 1,200 rows have an unknown role (1.00%); map the roles with data.roles, "
        "fix the rows, or raise this limit to allow them:"
    )
    assert lines[1] == "  rows.jsonl:1: turn 0.from is 'robot'"
    assert lines[4] == "  ... and 9 more with the same reason"
    assert len(lines) == 5


def test_no_error_asks_to_raise_a_limit_that_would_leave_no_row() -> None:
    findings = Findings()
    for gate in quality_gates.MEANINGS:
        findings.add_many(gate, [], 10)
    problems = {verdict.gate: str(verdict.problem) for verdict in judge(findings, 10, Gates())}
    assert {gate for gate, text in problems.items() if "raise this limit" not in text} == set(quality_gates.LEFT_OUT)
    assert all("fix the rows" in text for text in problems.values())
    assert "data.end_of_turn" in problems["endless"]


def test_a_warning_says_what_was_found() -> None:
    findings = Findings()
    findings.add("overlong", "rows.jsonl:3", "9,000 tokens")
    findings.add_many("duplicates", [], 2)
    messages = [str(verdict) for verdict in judge(findings, 100, Gates())]
    assert messages == [
        "1 of 100 rows are longer than data.max_length (1.00%, data.gates.overlong=0.2):\n  rows.jsonl:3: 9,000 tokens",
        "2 of 100 rows are equal to an earlier row (2.00%, data.gates.duplicates=0.2)",
    ]
