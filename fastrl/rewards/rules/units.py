r"""Units: what a text after a number measures, and by which factor two of them differ.

`parse(r"\text{ km}/\mathrm{h}")` and `parse("kph")` are the same unit; "minutes" is 60 s or 1/60 of a degree. A word
that is no unit here ("apples") is kept as a word: equal words are the same unit, others are another one.
"""

import re
from dataclasses import dataclass
from fractions import Fraction as F
from functools import lru_cache

from fastrl.rewards.rules.spelling import TEXT_COMMAND

Dimension = tuple[tuple[str, int], ...]  # (("m", 1), ("s", -2)): sorted, no zero
Reading = tuple[Dimension, F]


def of(**powers: int) -> Dimension:
    return tuple(sorted((base, power) for base, power in powers.items() if power))


LENGTH, AREA, VOLUME, MASS, TIME = of(m=1), of(m=2), of(m=3), of(kg=1), of(s=1)
ANGLE, MONTH, SPEED, COUNT = of(degree=1), of(month=1), of(m=1, s=-1), ()
FORCE, ENERGY, POWER, PRESSURE = of(kg=1, m=1, s=-2), of(kg=1, m=2, s=-2), of(kg=1, m=2, s=-3), of(kg=1, m=-1, s=-2)
USD, EUR, GBP, JPY, CNY, INR = (of(**{code: 1}) for code in ("USD", "EUR", "GBP", "JPY", "CNY", "INR"))

POUND, INCH = F(45359237, 100000000), F(254, 10000)
GALLON = 231 * INCH**3
MILE = 5280 * 12 * INCH

# names (exactly as written if they have a capital or one letter, else in any case and number): dimension, factor
TABLE: list[tuple[str, Dimension, F | int]] = [
    ("m meter metre", LENGTH, 1),
    ("km kilometer kilometre kms", LENGTH, 1000),
    ("cm centimeter centimetre cms", LENGTH, F(1, 100)),
    ("mm millimeter millimetre", LENGTH, F(1, 1000)),
    ("dm decimeter decimetre", LENGTH, F(1, 10)),
    ("um micrometer micrometre micron", LENGTH, F(1, 10**6)),
    ("nm nanometer nanometre", LENGTH, F(1, 10**9)),
    ("in inch inche inches", LENGTH, INCH),
    ("ft foot feet", LENGTH, 12 * INCH),
    ("yd yard", LENGTH, 36 * INCH),
    ("mi mile", LENGTH, MILE),
    ("kg kilogram kilo kgs", MASS, 1),
    ("g gram gm gms", MASS, F(1, 1000)),
    ("mg milligram", MASS, F(1, 10**6)),
    ("tonne", MASS, 1000),
    ("lb pound lbs", MASS, POUND),
    ("oz ounce", MASS, POUND / 16),
    ("s sec second secs", TIME, 1),
    ("ms millisecond", TIME, F(1, 1000)),
    ("us microsecond", TIME, F(1, 10**6)),
    ("ns nanosecond", TIME, F(1, 10**9)),
    ("min minute mins", TIME, 60),
    ("h hr hour hrs", TIME, 3600),
    ("d day", TIME, 86400),
    ("wk week wks", TIME, 7 * 86400),
    ("fortnight", TIME, 14 * 86400),
    ("month", MONTH, 1),
    ("yr year yrs", MONTH, 12),
    ("decade", MONTH, 120),
    ("century centurie", MONTH, 1200),
    ("degree deg", ANGLE, 1),
    ("arcminute arcmin minute min", ANGLE, F(1, 60)),
    ("arcsecond arcsec second sec", ANGLE, F(1, 3600)),
    ("revolution turn", ANGLE, 360),
    ("L l liter litre ltr", VOLUME, F(1, 1000)),
    ("mL ml milliliter millilitre cc", VOLUME, F(1, 10**6)),
    ("cL cl centiliter centilitre", VOLUME, F(1, 10**5)),
    ("dL dl deciliter decilitre", VOLUME, F(1, 10**4)),
    ("gal gallon", VOLUME, GALLON),
    ("qt quart", VOLUME, GALLON / 4),
    ("pt pint", VOLUME, GALLON / 8),
    ("cup", VOLUME, GALLON / 16),
    ("tbsp tablespoon", VOLUME, GALLON / 256),
    ("tsp teaspoon", VOLUME, GALLON / 768),
    ("acre", AREA, 43560 * 144 * INCH**2),
    ("ha hectare", AREA, 10**4),
    ("mph", SPEED, MILE / 3600),
    ("kph kmh kmph", SPEED, F(1000, 3600)),
    ("N newton", FORCE, 1),
    ("kN kilonewton", FORCE, 1000),
    ("J joule", ENERGY, 1),
    ("kJ kilojoule", ENERGY, 1000),
    ("MJ megajoule", ENERGY, 10**6),
    ("W watt", POWER, 1),
    ("kW kilowatt", POWER, 1000),
    ("MW megawatt", POWER, 10**6),
    ("kWh", ENERGY, 3600000),
    ("Pa pascal", PRESSURE, 1),
    ("kPa kilopascal", PRESSURE, 1000),
    ("MPa megapascal", PRESSURE, 10**6),
    ("Hz hertz", of(s=-1), 1),
    ("kHz kilohertz", of(s=-1), 1000),
    ("MHz megahertz", of(s=-1), 10**6),
    ("GHz gigahertz", of(s=-1), 10**9),
    ("K kelvin", of(kelvin=1), 1),
    ("celsius", of(celsius=1), 1),
    ("fahrenheit", of(fahrenheit=1), 1),
    ("A amp ampere", of(ampere=1), 1),
    ("mA milliamp milliampere", of(ampere=1), F(1, 1000)),
    ("V volt", of(volt=1), 1),
    ("mV millivolt", of(volt=1), F(1, 1000)),
    ("kV kilovolt", of(volt=1), 1000),
    ("ohm", of(ohm=1), 1),
    ("mol mole", of(mol=1), 1),
    ("eV electronvolt", of(eV=1), 1),
    ("keV", of(eV=1), 1000),
    ("MeV", of(eV=1), 10**6),
    ("USD dollar", USD, 1),
    ("EUR euro", EUR, 1),
    ("GBP quid pound", GBP, 1),
    ("JPY yen", JPY, 1),
    ("CNY RMB yuan yen", CNY, 1),  # they share a sign
    ("INR Rs rs rupee", INR, 1),
    ("cent", USD, F(1, 100)),
    ("cent", EUR, F(1, 100)),
    ("penny pennie", USD, F(1, 100)),
    ("penny pennie pence", GBP, F(1, 100)),
    ("paisa paise", INR, F(1, 100)),
]
SIGNS = {"$": "USD", "\u20ac": "EUR", "\u00a3": "GBP", "\u00a5": "yen", "\u20b9": "INR", "\u00a2": "cent"}
PREFIXES = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
GENERIC = frozenset({"unit"})  # of any kind: only its power counts
# what may stand around a unit and changes nothing: 3 feet tall, 42 is the answer
FILLER = frozenset(
    "long wide high tall deep old away apart total ago later each exactly in of the a is are answer altogether".split()
)
NO_UNIT = frozenset(
    "pi e i or and not if for when where plus minus mod root percent hundred thousand million billion trillion dozen "
    "pair lakh crore squared cubed factorial half halve third fourth fifth tenth hundredth thousandth".split()
)


@dataclass(slots=True, frozen=True)
class Unit:
    """A unit by its dimension and factor, and by its words where they are no known unit."""

    readings: tuple[Reading, ...]  # what its known names measure; an ambiguous one has several: a minute
    radians: int  # power of 180/pi in the factor
    words: frozenset[str]  # names that are not known, in the singular
    generic: int | None  # the power of `units`: 2 for square units


def known(name: str) -> list[Reading]:
    return NAMES.get(name) or len(name) > 1 and NAMES.get(name.lower()) or NAMES.get(singular(name)) or []


def singular(word: str) -> str:
    """`Feet` -> feet, `Hours` -> hour, `pass` -> pass."""
    word = word.lower() if len(word) > 1 else word
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


NAMES: dict[str, list[Reading]] = {}
for names, dimension, factor in TABLE:
    for each in names.split():
        NAMES.setdefault(each, []).append((dimension, F(factor)))

TEXT = re.compile(TEXT_COMMAND + r" ?\{([^{}]*)\}")
TOKEN = re.compile(
    r" *(?:(?P<word>[A-Za-z]+)\.?|(?P<sign>[$\u20ac\u00a3\u00a5\u20b9\u00a2])"
    r"|(?P<degree>\^\\circ ?(?P<scale>[CF](?![A-Za-z]))?)"
    r"|(?P<over>/)|(?P<times>\\cdot|\\times|\*|-)) *(?:\^ ?\{? ?(?P<power>-?\d) ?\}?)?"
)
FRACTION = re.compile(r"\\frac ?\{ ?([^{}]*) ?\} ?\{ ?([^{}]*) ?\}")


SQUARED = re.compile(r"([A-Za-z]+) (squared|cubed)")
DEGREES_OF = re.compile(r"(?:degrees?|\^\\circ) ?(?=celsius|fahrenheit)", re.IGNORECASE)
RESPELLED = [("\\mu ", "u"), ("\\$", "$"), ("\\ohm", "ohm"), ("\\Omega", "ohm"), ("~", " "), ("{}", "")]


@lru_cache(maxsize=4096)
def parse(text: str) -> Unit | None:
    """The unit that a text names, or None if it is none at all: it holds a digit, a variable, a command, or nothing."""
    text = TEXT.sub(r" \1 ", text)
    for old, new in RESPELLED:
        text = text.replace(old, new)
    text = " ".join(FRACTION.sub(r"\1/\2", text).split()).strip(" .,;").replace(" ^", "^")
    text = SQUARED.sub(lambda found: f"{found[1]}^{'2' if found[2] == 'squared' else '3'}", DEGREES_OF.sub("", text))
    tokens, at = [], 0
    while at < len(text):
        token = TOKEN.match(text, at)
        if token is None:
            return None
        tokens.append(token)
        at = token.end()
    return combined(tokens) if tokens else None


def combined(tokens: list[re.Match]) -> Unit | None:
    """The product of units that stand behind each other; after `/` or `per` one is divided by."""
    readings: list[Reading] = [((), F(1))]
    radians, below, prefix = 0, False, 1
    words: set[str] = set()
    generic = None
    for token in tokens:
        word = name_of(token)
        lower = word.lower()
        if token["over"] or lower == "per":
            below = True
        elif lower in PREFIXES:
            prefix = PREFIXES[lower]
        elif word:
            power = int(token["power"] or 1) * prefix * (-1 if below else 1)
            below, prefix = False, 1
            radian = lower in ("rad", "radian", "radians")
            radians += power * radian
            if found := [(ANGLE, F(1))] if radian else known(word):
                readings = [
                    (multiplied(dimension, other, power), factor * by**power)
                    for dimension, factor in readings
                    for other, by in found
                ][:8]
            elif singular(word) in GENERIC:
                generic = power
            elif len(word) == 1 and word != "a" or singular(word) in NO_UNIT:
                return None
            elif lower not in FILLER:
                words.add(singular(word))
    return Unit(tuple(readings), radians, frozenset(words), generic)


def name_of(token: re.Match) -> str:
    if token["sign"]:
        return SIGNS[token["sign"]]
    if token["degree"]:
        return {"C": "celsius", "F": "fahrenheit"}.get(token["scale"] or "", "degree")
    return token["word"] or ""


def multiplied(one: Dimension, other: Dimension, power: int) -> Dimension:
    powers = dict(one)
    for base, exponent in other:
        powers[base] = powers.get(base, 0) + exponent * power
    return of(**powers)


def ratio(gold: Unit, answer: Unit) -> tuple[F, int] | None:
    """What an answer's number is multiplied by to be in the gold's unit: a factor and a power of pi; None if it cannot.

    minutes -> hours: (1/60, 0); radians -> degrees: (180, -1); cups of flour -> cups: (1, 0); apples -> pears: None.
    """
    if gold.generic is not None or answer.generic is not None:
        return (F(1), 0) if length_power(gold) == length_power(answer) else None
    both_known = gold.readings[0][0] != () and answer.readings[0][0] != ()
    one_has_none = both_known and not (gold.words and answer.words)
    if not (one_has_none or gold.words <= answer.words or answer.words <= gold.words):
        return None
    if not both_known and bool(gold.words) != bool(answer.words):
        return None
    turned = answer.radians - gold.radians
    for dimension, factor in gold.readings:
        for other, by in answer.readings:
            if dimension == other:
                return by / factor * F(180) ** turned, -turned
    return None


def length_power(unit: Unit) -> int:
    """1 for `units` and cm, 2 for square units and cm^2; a thing that is counted is one of `units`, too."""
    if unit.generic is not None:
        return unit.generic
    powers = dict(unit.readings[0][0])
    return powers["m"] if set(powers) == {"m"} else 1
