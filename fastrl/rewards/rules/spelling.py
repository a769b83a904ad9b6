r"""One spelling for what LaTeX writes in several ways, undecorated: `{\color{red}{7 \over 2}}.` -> `\frac{7}{2}`.

`spell` keeps the `\text{..}` around a word, because a word is compared otherwise than a product of variables; `clean`
drops it where it is around all of the answer. A blank is never removed between two characters: `4 2` is not 42.
"""

import re
from functools import lru_cache

from fastrl.rewards.rules.unicode import latex

LONG = 1024  # characters; what is longer is too long to be compared but as text, and only its ends are trimmed

BLANKS = re.compile(r"(?:\s|~|(?<!\\)\\[,;:>! ]|\\q?quad(?![A-Za-z])|\\(?:enspace|thinspace|hfill|space)(?![A-Za-z]))+")
NARROW = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\,|\\!)(?=\d{3}(?!\d))", re.ASCII)
GROUPED = re.compile(r"(?<![\w.,}^\\/])(?<![\w.}^/] )[1-9]\d{0,2}(?: \d{3})+(?![\d/]| ?[/\d])", re.ASCII)

TEXT_COMMAND = r"\\(?:text(?:bf|rm|it|sf|normal)?|mathrm|mathbf|mathit|mbox|operatorname|rm)"

# what is dropped wherever it stands
IGNORED = re.compile(
    r"\\(?:left|right|middle|[bB]igg?[lr]?|displaystyle|textstyle|scriptstyle|limits|nolimits|normalsize|[lL]arge|LARGE"
    r"|[hH]uge|small|boldmath|bfseries|bf|rm|it|sf|blacksquare|checkmark|qed|nonumber|mathstrut|strut|tiny)(?![A-Za-z])"
    r"|\\(?:hspace|vspace|phantom|hphantom|vphantom|color|label|kern)\*?\s*\{[^{}]*\}"
)
DELIMITERS = re.compile(r"(?<!\\)\\[()\[\]]")
# commands with one argument that stands for itself, and with a first argument that does not
WRAPPERS = re.compile(
    r"\\(?:textcolor\s*\{[^{}]*\}|colorbox\s*\{[^{}]*\}|underline|boldsymbol|bm|pmb|fbox|boxed|ensuremath|mathstrut|"
    r"mathbf|mathit|mathnormal|mathsf|textnormal)\s*\{"
)
SYNONYMS = [
    (re.compile(r"\\(?:[dtc]frac|nicefrac|sfrac|flatfrac)(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![A-Za-z])"), r"\\binom"),
    (re.compile(r"\\(?:leqslant|leq|leqq)(?![A-Za-z])"), r"\\le"),
    (re.compile(r"\\(?:geqslant|geq|geqq)(?![A-Za-z])"), r"\\ge"),
    (re.compile(r"\\neq(?![A-Za-z])"), r"\\ne"),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\(?:varnothing|empty)(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\(?:lbrace)(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\(?:rbrace)(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:langle|lparen)(?![A-Za-z])"), "("),
    (re.compile(r"\\(?:rangle|rparen)(?![A-Za-z])"), ")"),
    (re.compile(r"\\lbrack(?![A-Za-z])"), "["),
    (re.compile(r"\\rbrack(?![A-Za-z])"), "]"),
    (re.compile(r"\\infin(?![A-Za-z])"), r"\\infty"),
    (re.compile(r"\\(?:cdots|dots|dotsc|dotsb)(?![A-Za-z])"), r"\\ldots"),
    (re.compile(r"\\measuredangle(?![A-Za-z])"), r"\\angle"),
    (re.compile(r"\\colon(?![A-Za-z])|\{ ?: ?\}"), ":"),
    (re.compile(r"\\(?:sim|approx|doteq|simeq)(?![A-Za-z])"), r"\\approx"),
    (re.compile(r"\\pi(?=[A-Za-z])"), r"\\pi"),
    # degrees and primes
    (re.compile(r"\^ ?\{ ?\\(?:circ|degree) ?\}|\^ ?\\circ(?![A-Za-z])"), r"^\\circ"),
    (re.compile(r"\\(?:text)?degree(?![A-Za-z])(?: ?\{\})?"), r"^\\circ"),
    (re.compile(r"\^ ?\{ ?\\text(?:rm)? ?\{ ?o ?\} ?\}"), r"^\\circ"),
    (re.compile(r"\^ ?\{ ?((?:\\prime|')(?: ?(?:\\prime|'))*) ?\}"), r"\1"),
    (re.compile(r" ?\^? ?\\prime(?![A-Za-z])"), "'"),
    # single letters in roman type that are no unit: e, i
    (re.compile(TEXT_COMMAND + r" ?\{ ?([ei]) ?\}(?= ?(?:\^|[+\-*/)},]|$|\\cdot|\\times|\\pi))"), r"\1"),
    # currency
    (re.compile(r"\\text(?:bf|rm|it)? ?\{ ?\\?([$€£¥₹]) ?\}"), r"\\\1"),
    (re.compile(r"\\(?:textdollar|dollar)(?![A-Za-z])(?: ?\{\})?"), r"\\$"),
    (re.compile(r"\\(?:euro|EUR|texteuro)(?![A-Za-z])(?: ?\{\})?"), "€"),
    (re.compile(r"\\(?:pounds|textsterling)(?![A-Za-z])(?: ?\{\})?"), "£"),
    (re.compile(r"\\(?:yen|textyen)(?![A-Za-z])(?: ?\{\})?"), "¥"),
    (re.compile(r"\\([€£¥₹])"), r"\1"),
    (re.compile(r"\\(?:textpercent|percent)(?![A-Za-z])(?: ?\{\})?|\{ ?\\% ?\}|\\text ?\{ ?\\?% ?\}"), r"\\%"),
]  # fmt: skip
INFIX = re.compile(r"\\(over|choose)(?![A-Za-z])")
ANNOUNCED = re.compile(
    r"\\(?:text|textbf|textrm|textit|mathrm|mbox) ?\{ ?(?:(?:so |thus |therefore,? )?(?:the )?(?:final )?"
    r"(?:answer|ans\.?|solution)(?: is)? ?[:=]? ?)\} ?[:=]? ?",
    re.IGNORECASE,
)
STYLED = re.compile(TEXT_COMMAND + r"\s*\{([^{}]*)\}")
NAME = re.compile(r"\\?[A-Za-z]+(?:_(?:\w|\{\w+\}))?'*(?:\([\w, ]*\))?", re.ASCII)
EDGES = " .,;:"


def clean(text: str) -> str:
    r"""An answer in its one spelling, and without a `\text{..}` around all of it: `\text{42}.` -> `42`."""
    return unstyled(spell(text))


def unstyled(text: str) -> str:
    styled = STYLED.fullmatch(text)
    return styled[1].strip(EDGES) if styled else text


def spell(text: str) -> str:
    r"""An answer in its one spelling.

    `$3\,000$.` -> `3,000`, `\(\dfrac12\)` -> `\frac12`, `{7 \over 2}` -> `\frac{7}{2}`, `\langle1,2\rangle` -> `(1,2)`.
    """
    return spell_short(text) if len(text) <= LONG else edges(text)


def edges(text: str) -> str:
    text = BLANKS.sub(" ", text).strip().rstrip(EDGES)
    return text.strip("$").strip().rstrip(EDGES) if text[:1] == text[-1:] == "$" else text


@lru_cache(maxsize=8192)
def spell_short(text: str) -> str:
    if text.isalnum() and text.isascii():  # most answers: nothing to do
        return text
    text = text.replace("...", "\\ldots ")
    text = DELIMITERS.sub(" ", IGNORED.sub("", NARROW.sub(",", latex(text))))
    if text.count("$") - text.count("\\$") in (2, 4, 6, 8):
        text = re.sub(r"(?<!\\)\$", "", text)
    text = BLANKS.sub(" ", text).strip().rstrip(EDGES)
    if "\\" in text or "{" in text:
        for pattern, replacement in SYNONYMS:
            text = pattern.sub(replacement, text)
        text = infix_to_prefix(unwrapped(text))
        text = ANNOUNCED.sub("", text, count=1) if ANNOUNCED.match(text) else text
        text = without_estimate(text)
    text = GROUPED.sub(lambda number: number[0].replace(" ", ","), without_braces(text.removeprefix("=").lstrip()))
    return text.strip().rstrip(EDGES)


def without_estimate(text: str) -> str:
    r"""`x \approx 3.14` -> `x = 3.14`, `\approx 3.14` -> `3.14`, `\frac{22}{7} \approx 3.14` -> `\frac{22}{7}`."""
    left, mark, right = text.partition("\\approx")
    left, right = left.strip(), right.strip()
    if not mark or not right:
        return text
    if not left:
        return right
    return f"{left} = {right}" if NAME.fullmatch(left) else left


def closing(text: str, start: int) -> int:
    r"""Where the brace that opens at `start` is closed, -1 if nowhere; `\{` and `\}` are no braces."""
    depth, at = 0, start
    while at < len(text):
        if text[at] == "\\":
            at += 1
        elif text[at] == "{":
            depth += 1
        elif text[at] == "}":
            depth -= 1
            if not depth:
                return at
        at += 1
    return -1


def without_braces(text: str) -> str:
    """`{42}` -> `42`; `{1}{2}` stays."""
    while text.startswith("{") and closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def unwrapped(text: str) -> str:
    r"""`\textcolor{red}{\frac12}` -> `\frac12`, `\mathbf{42}` -> `42`."""
    at = 0
    while found := WRAPPERS.search(text, at):
        end = closing(text, found.end() - 1)
        at = found.start()
        if end < 0:
            break
        text = text[:at] + text[found.end() : end] + text[end + 1 :]
    return text


def infix_to_prefix(text: str) -> str:
    r"""`{a \over b}` -> `\frac{a}{b}`, `{n \choose k}` -> `\binom{n}{k}`; without braces all the text."""
    while found := INFIX.search(text):
        start, end = enclosing(text, found.start())
        command = "frac" if found[1] == "over" else "binom"
        top, bottom = text[start : found.start()].strip(), text[found.end() : end].strip()
        inner = rf"\{command}{{{top}}}{{{bottom}}}"
        before, after = (text[: start - 1], text[end + 1 :]) if start else ("", "")
        text = before + inner + after
    return text


def enclosing(text: str, at: int) -> tuple[int, int]:
    """Start and end of what is inside the innermost braces around `at`; all of the text if there are none."""
    opened: list[int] = []
    escaped = False
    for i in range(at):
        if escaped:
            escaped = False
        elif text[i] == "\\":
            escaped = True
        elif text[i] == "{":
            opened.append(i)
        elif text[i] == "}" and opened:
            opened.pop()
    if not opened:
        return 0, len(text)
    end = closing(text, opened[-1])
    return opened[-1] + 1, end if end > at else len(text)
