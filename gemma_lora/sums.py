"""Do the sums of a worked solution hold? Annotations <<48/2=24>>, and the answer after ####."""

import ast
import contextlib
import math
import operator
import re
from collections.abc import Callable
from fractions import Fraction

# With its =: code shifts bits and writes to streams by the same marks, and compares with ==.
_ANNOTATION = re.compile(r"<<(?![^<>\n]*==)([^<>\n]{0,200}=[^<>\n]{0,200})>>")
_FINAL = re.compile(r"^[ \t]*####[ \t]*(\S.*)$", re.M)
# A - that stands behind an operand is not the number's.
_NUMBER = re.compile(r"(?:(?<![\w)%°'])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)", re.A)


def arithmetic(text: str) -> list[str]:
    """The annotations of a text that do not hold, each as '<<12*3=38>>: 12*3 is 36'.

    An annotation is <<expression=result>> (or =expression=result). The expression is computed
    exactly. It holds where |expression - result| is at most half a unit of the last digit that the
    result writes, or where result is the expression cut off after the digits of its own that stand
    behind the point: of 2/3, 0.67, .66 and 1 hold, 0 does not. A fraction as result must be exact;
    one with % may count per cent or be the fraction. What is no arithmetic (algebra, words, huge
    powers) is passed over; a division by zero does not hold.
    """
    return [why for body in _ANNOTATION.findall(text) if (why := _contradiction(body))]


def _contradiction(body: str) -> str:
    *sides, written = body.split("=")
    try:
        result = evaluate(written.replace("%", ""))
        values = [(side.strip(), evaluate(side)) for side in sides if side.strip()]
    except ZeroDivisionError:
        return f"<<{body}>>: divides by zero"
    if result is None:
        return ""
    digits = None if "/" in written else len(written.strip(" $%()").partition(".")[2])
    scales = (1, 100) if "%" in written else (1,)
    for side, value in values:
        if value is not None and not any(_holds(value * s, result, digits) for s in scales):
            return f"<<{body}>>: {side} is {_show(value)}"
    return ""


def _holds(value: Fraction, result: Fraction, digits: int | None) -> bool:
    """digits: behind the point of the result; None: it is a fraction, and exact."""
    if digits is None:
        return value == result
    unit = Fraction(1, 10**digits)
    cut_off = digits > 0 and math.trunc(value / unit) * unit == result
    return cut_off or abs(value - result) <= unit / 2


def _show(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"


_OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}
_SIGNS = str.maketrans({"\N{MULTIPLICATION SIGN}": "*", "\N{DIVISION SIGN}": "/",
                        "\N{MINUS SIGN}": "-", "$": ""})  # fmt: skip
_ARITHMETIC = re.compile(r"[0-9.+\-*/%() ]+")
# A % that no operand follows is a percentage; any other is the remainder.
_PERCENT = re.compile(r"([0-9.]+|\([^()]*\))\s*%(?!\s*[0-9.(])")
_BITS = 1024  # of a numerator or denominator, at most: more is no sum that a text would do
_DIGITS = 300  # of a number in a text, at most: about what _BITS hold


def evaluate(text: str) -> Fraction | None:
    """The exact value of an expression; None: it is none, or too large. ZeroDivisionError."""
    text = text.translate(_SIGNS)
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text).strip()
    if not _ARITHMETIC.fullmatch(text):
        return None  # before the parser sees it: no names, strings, calls by name, underscores
    text = re.sub(r"(?<![0-9.])0+(?=[0-9])", "", text)  # Python takes no leading zeros
    text = _PERCENT.sub(r"(\1/100)", text)
    try:
        return _value(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, text: str) -> Fraction:
    match node:
        case ast.Constant():
            # From the digits: the parser's float is not what 0.1 says.
            value = Fraction(text[node.col_offset : node.end_col_offset])
        case ast.UnaryOp(op=ast.UAdd()):
            value = _value(node.operand, text)
        case ast.UnaryOp(op=ast.USub()):
            value = -_value(node.operand, text)
        case ast.BinOp():
            apply = _power if isinstance(node.op, ast.Pow) else _OPERATORS[type(node.op)]
            value = apply(_value(node.left, text), _value(node.right, text))
        case _:
            raise ValueError("no arithmetic")
    if _bits(value) > _BITS:
        raise ValueError("too large")
    return value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    # Before it is computed: the result has about this many bits.
    if exponent.denominator != 1 or abs(exponent) * _bits(base) > _BITS:
        raise ValueError("no power, or too large")
    return base ** int(exponent)


def final_answer(text: str) -> str:
    """Why the answer after the last #### is not where the text arrives; '' where it is."""
    marks = list(_FINAL.finditer(text))
    if not marks:
        return ""
    steps = text[: marks[-1].start()].rstrip()
    annotations = _ANNOTATION.findall(steps)
    answer = _numbers(marks[-1][1])
    if not annotations or len(answer) != 1:
        return ""
    last = annotations[-1].rpartition("=")[2].strip()
    reached = _numbers(last)
    with contextlib.suppress(ZeroDivisionError):
        # A fraction is one number.
        whole = evaluate(last.replace("%", ""))
        reached += [] if whole is None else [whole]
    if not reached:
        return ""
    # Factor 100: steps in dollars or parts of one, the answer in cents or per cent, or the reverse.
    # What is no whole number may be counted in whole ones.
    at = reached[-1]
    if answer[0] in (at, 100 * at, at / 100, math.floor(at), math.ceil(at)):
        return ""
    # Many a last step is not annotated, and says its result in words; some write 3 400.
    # What stands before an annotation are its operands.
    line = steps.rpartition("\n")[2].lstrip("-• ").rpartition(">>")[2]
    if answer[0] in _numbers(line) + _numbers(re.sub(r"(?<=\d) (?=\d{3}\b)", "", line)):
        return ""
    return f"#### {marks[-1][1].strip()}, but the last step gives {last}"


def result(text: str) -> Fraction | None:
    """The number that a worked solution arrives at: the first after its last ####; without that
    mark, the last of the text. None: there is none."""
    marks = list(_FINAL.finditer(text))
    found = _numbers(marks[-1][1] if marks else text)
    return (found[0] if marks else found[-1]) if found else None


def _numbers(text: str) -> list[Fraction]:
    text = text.replace("\N{MINUS SIGN}", "-").replace("$", "")
    # Python makes no number of thousands of digits.
    found = [n.replace(",", "") for n in _NUMBER.findall(text)]
    return [Fraction(n) for n in found if len(n) <= _DIGITS]
