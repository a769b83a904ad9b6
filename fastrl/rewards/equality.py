"""Whether two sympy expressions are equal: in place of math-verify's comparison, which is lenient in five ways.

math-verify rounds to 6 decimals where one side has a point, drops what is below 1e-15, reads 9% as 9, keeps i a symbol,
and calls two equations equal that it cannot solve: 1/2004! is 1/2006!, and 3.14159265358979 is pi. Here decimals are
the fractions they write, values are compared relative to their size, and expressions with variables at points.

Only the worker process loads this file, as a file: nothing of fastrl is imported beside sympy.
"""

import functools
from collections.abc import Sequence
from fractions import Fraction

import sympy
from math_verify import grader
from sympy import Basic, Float, I, MatrixBase, Rational, Symbol

DIGITS = 70  # that both sides are evaluated to
TOLERANCE = Rational(1, 10**60)  # of their larger value
ROUNDED = 10**6  # a decimal with this denominator or a larger one stands for a fraction that it rounds
# arguments for variables, in the order of their names: no small numbers, in no simple relation; positive ones first
POINTS = [
    [Rational(n, d) for n, d in ((1237, 701), (853, 1009), (2111, 907), (577, 1301), (1637, 599), (977, 761))],
    [Rational(n, d) for n, d in ((499, 1117), (1723, 641), (683, 1451), (2269, 883), (1213, 1039), (821, 509))],
    [Rational(n, d) for n, d in ((-1511, 877), (937, 1193), (-743, 2003), (-1871, 613), (1409, 967), (-641, 1223))],
    [Rational(n, d) for n, d in ((1069, 1487), (-1787, 733), (-1327, 619), (907, 1549), (-883, 1723), (2027, 769))],
]
ALL_POSITIVE = 2  # of POINTS
STEPS = (sympy.floor, sympy.ceiling, sympy.Mod, sympy.sign, sympy.Heaviside, sympy.Piecewise)
SPREAD = (1, 997, 99991)  # times POINTS, where floor(n/5) and floor(n/6) are to differ
UNCERTAIN = (
    sympy.Sum,
    sympy.Product,
    sympy.Integral,
    sympy.Limit,
    sympy.Derivative,
)  # slow, or defined at whole numbers

math_verify_symbolic = grader.sympy_symbolic_eq
math_verify_solutions = grader.sympy_solve_and_compare


def install() -> None:
    """math-verify compares by this file from now on. What it does with sets, tuples and relations stays."""
    grader.sympy_numeric_eq = numeric_eq
    grader.sympy_symbolic_eq = symbolic_eq
    grader.sympy_solve_and_compare = same_solutions


def numeric_eq(a, b, float_rounding: int, numeric_precision: int) -> bool:
    """Equal in value; False where that cannot be said without simplifying."""
    if isinstance(a, MatrixBase) or isinstance(b, MatrixBase) or getattr(a, "is_Matrix", False):
        a, b = (grader.safe_sympy_doit(each) for each in (a, b))
        if not (isinstance(a, MatrixBase) and isinstance(b, MatrixBase) and a.shape == b.shape):
            return False
        return all(
            numeric_eq(x, y, float_rounding, numeric_precision) or symbolic_eq(x, y)
            for x, y in zip(a.flat(), b.flat(), strict=True)
        )
    return same(exact(a), exact(b)) is True or rounds_to(a, b) or rounds_to(b, a)


def symbolic_eq(a, b) -> bool:
    """Equal after simplification, which is left out where values already differ."""
    a, b = exact(a), exact(b)
    return same(a, b) is not False and math_verify_symbolic(a, b)


def same_solutions(gold, answer, float_rounding: int, numeric_precision: int) -> bool:
    """Relations of the same variables that have solutions, and the same ones."""
    if gold.free_symbols != answer.free_symbols:
        return False
    if len(gold.free_symbols) == 1 and not isinstance(gold, sympy.Eq):
        return gold.as_set() == answer.as_set()
    if isinstance(gold, sympy.Eq) and not sympy.solve(gold, gold.free_symbols):
        return False
    return math_verify_solutions(gold, answer, float_rounding, numeric_precision)


def exact(a):
    """Decimals as fractions, a percent sign as 1/100, and i as the root of -1: 0.5x -> x/2."""
    if not isinstance(a, Basic):
        return a
    decimals = {number: Rational(str(number)) for number in a.atoms(Float) if number.is_finite}
    held = {each: each.args[0] for each in a.atoms(sympy.UnevaluatedExpr)}
    if not a.has(*UNCERTAIN):
        decimals |= {symbol: I for symbol in a.atoms(Symbol) if symbol.name == "i"}
    return a.xreplace(held).xreplace(decimals) if held or decimals else a


@functools.lru_cache(maxsize=32)
def same(a, b) -> bool | None:
    """True or False where values tell, None where they do not. Variables are the same by name, real or complex."""
    if a == b:
        return True
    try:
        names = sorted({symbol.name for each in (a, b) for symbol in each.free_symbols})
        if not names:
            return same_value(grader.safe_sympy_doit(a), grader.safe_sympy_doit(b))
        if len(names) > len(POINTS[0]) or a.has(*UNCERTAIN) or b.has(*UNCERTAIN):
            return None
        factors = SPREAD if a.has(*STEPS) or b.has(*STEPS) else SPREAD[:1]
        points = [[factor * each for each in point] for factor in factors for point in POINTS]
        found = [same_value(*(at(each, names, point) for each in (a, b))) for point in points]
    except MemoryError:
        raise  # a fresh process is asked
    except Exception:  # whatever sympy raises where an expression has no value at a point: nothing is known by points
        return None
    if all(found):
        return True
    return False if False in found[:ALL_POSITIVE] else None


def at(expression, names: list[str], point: Sequence[sympy.Expr]):
    values = dict(zip(names, point, strict=False))
    return expression.subs({symbol: values[symbol.name] for symbol in expression.free_symbols})


def same_value(a, b) -> bool | None:
    """Whether two expressions without variables have one value; None where evaluation leaves no digits to compare."""
    if a == b:
        return True
    uncertain = a.has(*UNCERTAIN) or b.has(*UNCERTAIN)
    digits, tolerance = (20, Rational(1, 10**15)) if uncertain else (DIGITS, TOLERANCE)
    one, other = (each.evalf(digits, maxn=2 * digits) for each in (a, b))
    if not (evaluated(one) and evaluated(other)):
        return None
    scale = max(abs(one), abs(other))
    return bool(abs(one - other) <= scale * tolerance)


def evaluated(value) -> bool:
    """A finite number with digits that count; where all cancel, as in 1 - sin^2 - cos^2, sympy leaves one."""
    parts = value.as_real_imag() if value.is_number else ()
    numbers = [part for part in parts if part != 0]
    return bool(parts) and all(part.is_Rational or part.is_Float and part._prec > 30 for part in numbers)


def rounds_to(fraction, rounded) -> bool:
    """1/3 and 0.333333; not 5 and 5.0000001, nor pi and 3.14159265."""
    if not (isinstance(fraction, Rational) and isinstance(rounded, Float) and rounded.is_finite):
        return False
    decimal = Fraction(str(rounded))
    if decimal.denominator < ROUNDED or all(prime in (2, 5) for prime in sympy.factorint(fraction.q, limit=10)):
        return False
    return bool(
        abs(Fraction(int(fraction.p), int(fraction.q)) - decimal) <= Fraction(1, 2 * ROUNDED)
        and abs(decimal) * ROUNDED >= 10**5
    )
