r"""Names that math-verify takes for one another, made different before it reads them.

It reads letters without their case, and drops primes and accents: `R` and `r`, `f'(x)` and `f(x)`, `\vec{AB}` and
`\vec{BA}`. It reads `E` and `I` as e and i, `\gamma` as a constant or a function, and a derivative `\frac{dx}{dt}` of a
letter as 0. Each such name becomes a Greek letter that neither text has: the same in both.
"""

import re

GREEK = (
    "alpha beta delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega"
).split()
ACCENTS = "|".join(
    "vec hat widehat bar overline tilde widetilde dot ddot overrightarrow overleftarrow check breve acute grave "
    "mathcal mathscr mathfrak".split()
)
OPAQUE = r"\\(?:text\w*|math(?:rm|bb)|mbox|operatorname|begin|end)\*? ?\{[^{}]*\}"
ACCENTED = (
    rf"\\(?P<accent>{ACCENTS})(?![A-Za-z]) ?"
    r"(?:\{ ?(?P<letters>\\?[A-Za-z]+(?:_\w)?) ?\}|(?P<letter>[A-Za-z]))(?P<primes>'*)"
)
ORDER = r"(?:\^ ?(?:\d|\{\d\}))? ?"
D = rf"(?:d|\\partial|\\mathrm ?\{{ ?d ?\}}) ?{ORDER}"
DERIVATIVE = rf"\\frac ?\{{ ?{D}\\?[A-Za-z]+(?:_\w|_\{{\w+\}})? ?\}} ?\{{ ?{D}\\?[A-Za-z]+ ?{ORDER}\}}"
TOKEN = re.compile(
    rf"(?P<derivative>{DERIVATIVE})|(?P<opaque>{OPAQUE})|(?P<accented>{ACCENTED})"
    r"|(?P<primed>(?:(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])|\\[A-Za-z]+|[A-Za-z])'+)"
    r"|(?P<command>\\[A-Za-z]+)|(?P<plain>[A-Za-z])"
)
BAR = {"bar": "overline", "widehat": "hat", "widetilde": "tilde", "overrightarrow": "vec"}
COMMAND = re.compile(r"\\[A-Za-z]+")
CONSTANT = re.compile(r"\+ ?(?P<constant>[Cc])$")


def told_apart(gold: str, answer: str) -> tuple[str, str]:
    r"""`f'(x)`, `f(x)` -> `\alpha (x)`, `f(x)`; `2\pi R`, `2\pi r` -> `2\pi \alpha `, `2\pi r`.

    Texts without such names stay as they are. A constant of integration may be c or C.
    """
    if CONSTANT.search(gold) and CONSTANT.search(answer) and "c" not in COMMAND.sub("", gold[:-1]).lower():
        answer = answer[:-1] + gold[-1]
    tokens = [list(TOKEN.finditer(text)) for text in (gold, answer)]
    every = [token for each in tokens for token in each]
    used = {token["command"][1:].lower() for token in every if token["command"]}
    letters = {token["plain"] for token in every if token["plain"]}
    commands = {token["command"] for token in every if token["command"]}
    clashing = {letter for letter in letters if letter.isupper() and (letter in "EI" or letter.lower() in letters)}
    clashing |= commands & {"\\gamma"}
    clashing |= {
        name for name in commands if name[1].isupper() and name.lower() in commands and name[1:].lower() in GREEK
    }
    keys = list(dict.fromkeys(key for token in every if (key := key_of(token, clashing))))
    free = [name for name in GREEK if name not in used]
    if not keys or len(keys) > len(free):
        return gold, answer
    names = {key: rf"\{name} " for key, name in zip(keys, free, strict=False)}
    return renamed(gold, tokens[0], names, clashing), renamed(answer, tokens[1], names, clashing)


def key_of(token: re.Match, clashing: set[str]) -> str | None:
    """What is renamed in its place; None for a token that stays."""
    if token["derivative"]:
        return token["derivative"].replace(" ", "")
    if token["accented"]:
        accent = BAR.get(token["accent"], token["accent"])
        letters = token["letters"] or token["letter"]
        if accent == "overline" and len(letters) == 2 and letters.isupper():
            letters = "".join(sorted(letters))  # a segment has no direction
        return f"{accent} {letters}{token['primes']}"
    if token["primed"]:
        return token["primed"]
    name = token["plain"] or token["command"]
    return name if name in clashing else None


def renamed(text: str, tokens: list[re.Match], names: dict[str, str], clashing: set[str]) -> str:
    parts, at = [], 0
    for token in tokens:
        if key := key_of(token, clashing):
            parts += [text[at : token.start()], names[key]]
            at = token.end()
    return "".join(parts) + text[at:]
