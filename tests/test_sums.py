"""Annotations and final answers of worked problems: those that hold and those that do not."""

from fractions import Fraction

import pytest
from test_rules import flagged, row

from gemma_lora.sums import arithmetic, result


@pytest.mark.parametrize(
    "body",
    [
        *("48/2=24", "1/3=.33", "1/3=0.3333", "2/3=.67", "2/3=.66", "2/3=1", "7/2=4", "-5/2=-2.5"),
        *("10/(5)%=200", "1/3=(0.3)"),
        *("20%*50=10", "50*20%=10", "(10+10)%*50=10", "10/20=50%", "10/20*100=50%", "1/3=33.3%"),
        *("1,000*2=2,000", "$5*3=$15", ".5*2=1", "0.1+0.2=.3", "7%3=1", "2**10=1024", "007+1=8"),
        *(
            "-3+-4=-7",
            "1/2+1/4=3/4",
            "560//10=56",
            "3*(2+1)=9=9",
            "+10=10",
            "2*3.50=7.00",
            "1000000*3=3,000,000",
            "3\N{MULTIPLICATION SIGN}4=12",
            "8\N{DIVISION SIGN}2=4",
            "5\N{MINUS SIGN}7=\N{MINUS SIGN}2",
        ),
    ],
)
def test_annotations_that_hold(body):
    assert arithmetic(f"so <<{body}>> it is") == []


@pytest.mark.parametrize(
    ("body", "value"),
    [
        *[
            ("12*3=38", "12*3 is 36"),
            ("1/3=.34", "0.333"),
            ("1/3=.3334", "0.333"),
            ("2/3=0", "0.66"),
        ],
        *[("20%*50=11", "is 10"), ("10/20=51%", "is 0.5"), ("1,000*2=2,001", "is 2000")],
        *[("0.1+0.2=.31", "is 0.3"), ("7%3=2", "is 1"), ("3+3=5=6", ""), ("-3+-4=7", "is -7")],
        *[("5/0=0", "divides by zero"), ("5%0=0", "divides by zero"), ("0**-1=0", "by zero")],
        *[("10000000000000001*1=10000000000000000", "is 10000000000000001"), ("5-5=1", "is 0")],
        ("3\N{MULTIPLICATION SIGN}4=13", "3\N{MULTIPLICATION SIGN}4 is 12"),
        *[("5*1=0", "is 5"), ("1/2+1/4=1/4", "is 0.75"), ("1/4=1/3", "is 0.25")],
    ],
)
def test_annotations_that_do_not_hold(body, value):
    if body == "3+3=5=6":  # 5 is not 6, though 3+3 is
        value = "5 is 5"
    (why,) = arithmetic(f"first <<1+1=2>>2, then <<{body}>> it is")
    assert why.startswith(f"<<{body}>>: ") and value in why


@pytest.mark.parametrize(
    "body",
    [
        *(
            "__import__('os')=1",
            "9**9**9=1",
            "(-9)**9**9=1",
            "9**-999999999=1",
            "2**.5=1.4",
            "x=10",
        ),
        *(
            "(" * 90 + "1" + ")" * 90 + "=2=x",
            "1" * 5000 + "=2",
            "9" * 180 + "**9=1",
            "2*x+5=9",
            "=",
            "",
        ),
        *(
            "5(3)=1",
            "5 3=1",
            "1..real=1",
            "1_0=2",
            "1e9999=1",
            "...=1",
            "lambda:0=1",
            "\u0663=4",
            "1/=2",
        ),
        *(
            "[1]*9**9=1",
            "1 if 1 else 2=2",
            "1;2=2",
            "3*4",
            "*=*",
            "-" * 190 + "1=x",
            "~1=1",
            "1<2=1",
        ),
    ],
)
def test_hostile_annotations_are_passed_over_at_once(body, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.eval", None)
    assert arithmetic(f"<<{body}>>") == []


def test_a_power_that_is_not_too_large_is_computed():
    assert arithmetic("<<9**9=387420489>>") == []
    assert arithmetic("<<9**9=1>>") == ["<<9**9=1>>: 9**9 is 387420489"]


def test_shifts_of_bits_are_no_annotations():
    assert arithmetic("assert 1<<3 == 16>>1 and 1 << 4 == 32 >> 1") == []


@pytest.mark.parametrize(
    ("completion", "bad"),
    [
        ("That is <<5+1=6>>6.\n#### 6", False),
        ("That is <<3-8=-5>>-5.\n#### -5", False),
        ("That is <<3-8=-5>>-5.\n#### 5", True),
        ("That is <<3-8=-$5>>-$5.\n#### -$5", False),
        ("That is <<3-8=\N{MINUS SIGN}5>>.\n#### \N{MINUS SIGN}5", False),
        ("That is <<5+1=6>>6%-5.\n#### 5", False),
        ("That is <<5+1=6>>6.\n-7 in all\n#### 7", False),
        ("That is <<1-1/2=1/2>>1/2 of it.\n#### 0.5", False),
        ("That is <<1-1/4=3/4>>3/4 of it.\n#### 0.5", True),
        ("That is <<1-1=0/0>>0.\n#### 3", True),
        ("That is <<5+1=6>>6.\n#### 7", True),
        ("That is <<5+1=6>>6.\nThen one more is 7.\n#### 7", False),
        ("First 7.\nThat is <<5+1=6>>6.\n#### 7", True),
        ("That is <<500*2=1000>>1000.\n#### 1,000", False),
        ("That is <<3*50=150>>150 cents.\n#### 1.50", False),
        ("That is <<100/30=3.33>>3.33 buses.\n#### 4", False),
        ("That is <<100/30=3.33>>3.33 buses.\n#### 3", False),
        ("That is <<100/30=3.33>>3.33 buses.\n#### 5", True),
        ("That is <<5*3=15>>15.\n#### 14", True),
        ("That is <<2*5=10.00>>10.\n#### $10", False),
        ("That is <<.5-.25=.25>>.25 a can.\n#### 25", False),
        ("Since <<1=1>>1, it is 17 000/5 = 3 400.\n#### 3400", False),
        ("That is 30*1/5 = <<30*1/5=6>>6.\n#### 5", True),
        ("That is 6.\n#### 7", False),
        ("That is <<5+1=6>>6.", False),
        ("That is <<5+1=6>>6.\n#### none", False),
        ("x = (a << 16) | (b >> 16);\n#### Step 2: explain", False),
        pytest.param(f"That is <<5+1=6>>6.\n#### 7{'0' * 5000}", False, id="a number of 5001"),
    ],
)
def test_final_answers(completion, bad):
    assert bool(flagged([row("a", completion=completion)], "final_answer")) == bad


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7\n#### 7", 7),
        ("#### 1\nNo:\n#### $1,234.50", Fraction("1234.5")),
        ("#### -3 of 4", -3),
        ("It costs 2 and then 18.", 18),
        ("7 #### 8", 8),  # no mark of its own line: the last number
        ("9\n#### none", None),
        ("none", None),
        ("", None),
    ],
)
def test_the_number_a_solution_arrives_at(text, number):
    assert result(text) == number
