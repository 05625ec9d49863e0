"""The metric's rules, each trap by a hand-made case, and its laws over the real rows where they are at hand."""

import csv
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_evolve.eval.metric import NOT_FOUND, exact, extract, has_box, verify

REAL_ROWS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "challenge" / "train_open.csv"


@pytest.fixture(scope="module")
def real_answers() -> list[str]:
    if not REAL_ROWS.is_file():
        pytest.skip(f"the challenge's rows are not at {REAL_ROWS}")
    with REAL_ROWS.open(encoding="utf-8", newline="") as file:
        return [row["answer"] for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{7} \boxed{}", "7"),
        (r"\boxed{7} \boxed{  }", "7"),
        (r"\boxed{} \boxed{ }", ""),
        (r"\boxed{unclosed", "unclosed"),
        (r"\boxed{first \boxed{second}", "second"),
        (r"\boxed{first \boxed{}", "first"),
        (r"\boxed{}52}", "}52"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{a\}", "a\\"),
        (r"\boxed{7} is {ok}.", "7} is {ok"),
        ("\\boxed{ a\nb }\n", "a\nb"),
        (r"\boxed {7} 8", "8"),
        (r"\boxed{3} The final answer is: 4", "3"),
    ],
)
def test_boxes(text, answer):
    assert extract(text) == answer
    assert has_box(text) == (r"\boxed{" in text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The final answer is: 3.14 m", "3.14 m"),
        ("the FINAL answer IS: x", "x"),
        ("Final answer is: one\nFinal answer is: two", "two"),
        ("final answer : a", "a"),
        ("Final answer：b", "b"),
        ("Final answer: c\nThe final answer is: d", "d"),
        ("The final answer is: d\nFinal answer: c", "d"),
        ("my final answer is: e\nfinal answer: f", "e"),
        ("The final answer is：9 of 10", "10"),
        ("The final answer is:\n  next line ", "next line"),
        ("The final answer is 12, not 13", "13"),
        ("The final answer is:", "The final answer is:"),
        ("between -2 and 3.50.", "3.50"),
        ("10-5", "-5"),
        ("1,234", "234"),
        ("−5", "5"),
        ("no digits\nlast line  \n\n", "last line"),
        ("  \n\t\n", NOT_FOUND),
        ("", NOT_FOUND),
        (None, NOT_FOUND),
    ],
)
def test_without_a_box(text, answer):
    assert extract(text) == answer


@pytest.mark.parametrize(
    ("gold", "prediction", "right"),
    [
        ("10011000", "10011000", True),
        ("01", "1", False),
        ("1", "1.0", False),
        ("10", "10.05", False),
        ("101", " 101 ", True),
        ("3", "03", True),
        ("03", "3", True),
        ("1000", "1e3", False),
        ("2000", "2e3", True),
        ("1e3", "1000", True),
        ("24.64", "24.6401", True),
        ("100.5", "101.5", True),
        ("25", "26", False),
        ("200", "202", True),
        ("200", "203", False),
        ("0.0", "0.00001", True),
        ("0.0", "0.00002", False),
        ("-5", "−5", False),
        ("2_5", "25", True),
        ("XLVII", "xlvii", True),
        ("Alice  reads", "alice reads", False),
        ("24.64", "24.64 m", False),
        ("2/4", "0.5", False),
        ("nan", "nan", False),
        ("", "", True),
    ],
)
def test_verify(gold, prediction, right):
    assert verify(gold, prediction) is right


def test_exact_text_is_stricter():
    assert exact("24.6", " 24.6 ")
    for gold, prediction in [("24.6", "24.60"), ("XL", "xl"), ("200", "201")]:
        assert verify(gold, prediction)
        assert not exact(gold, prediction)


@given(st.text(alphabet="ab01.-{}\\ \n", min_size=1).filter(lambda answer: answer.strip()), st.text(alphabet="xy 1\n"))
def test_a_box_at_the_end_gives_back_its_content(answer, before):
    assert extract(f"{before}\\boxed{{{answer}}}") == answer.strip()


@given(st.text(alphabet="\\boxed{} final answer:：1.\n"))
def test_every_text_has_an_answer_without_blanks_around(text):
    assert extract(text) == extract(text).strip()


def test_every_real_answer_is_found_in_its_box_and_is_right(real_answers):
    wrong = [gold for gold in real_answers if not verify(gold, extract(f"some steps, 12 of them\n\\boxed{{{gold}}}"))]
    assert len(wrong) == 0


def test_a_brace_after_the_box_breaks_every_real_row(real_answers):
    right = [gold for gold in real_answers if verify(gold, extract(f"\\boxed{{{gold}}} and so {{ok}}."))]
    assert len(right) == 0


def test_the_naive_pattern_missscores_real_rows(real_answers):
    def naive(text: str) -> str:
        return re.findall(r"\\boxed\{([^}]*)\}", text)[-1]

    wrong = [gold for gold in real_answers if not verify(gold, naive(f"\\boxed{{{gold}}}"))]
    assert 20 < len(wrong) < 94
    assert all("}" in gold for gold in wrong)


def test_binary_gold_is_strict_on_real_rows(real_answers):
    binary = [gold for gold in real_answers if re.fullmatch("[01]+", gold)]
    assert len(binary) > 700
    assert not any(verify(gold, f"0{gold}") for gold in binary)
