r"""Characters of unicode that have a command in LaTeX, as that command: `2√3` is `2\sqrt{3}`, `½` is `\frac{1}{2}`.

Only what is listed here is read. A full-width or Arabic digit, a blank of no width and a letter of another script stay
what they are: `４２` is not 42.
"""

import re
import unicodedata

FRACTIONS = {
    "½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5), "⅗": (3, 5),
    "⅘": (4, 5), "⅙": (1, 6), "⅚": (5, 6), "⅐": (1, 7), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8), "⅞": (7, 8),
    "⅑": (1, 9), "⅒": (1, 10),
}  # fmt: skip
COMMANDS = {
    "×": r"\times", "·": r"\cdot", "⋅": r"\cdot", "∙": r"\cdot", "÷": r"\div", "±": r"\pm", "∓": r"\mp",
    "≤": r"\le", "≥": r"\ge", "⩽": r"\le", "⩾": r"\ge", "≦": r"\le", "≧": r"\ge", "≠": r"\ne", "≈": r"\approx",
    "≡": r"\equiv", "≅": r"\cong", "∼": r"\sim", "∞": r"\infty", "∪": r"\cup", "∩": r"\cap", "∈": r"\in",
    "∉": r"\notin", "⊂": r"\subset", "⊆": r"\subseteq", "∅": r"\emptyset", "⌀": r"\emptyset", "∖": r"\setminus",
    "∠": r"\angle", "∡": r"\angle", "△": r"\triangle", "▵": r"\triangle", "⟨": r"\langle", "⟩": r"\rangle",
    "〈": r"\langle", "〉": r"\rangle", "→": r"\to", "⇒": r"\Rightarrow", "⊥": r"\perp", "∥": r"\parallel",
    "∑": r"\sum", "∏": r"\prod", "∫": r"\int", "∂": r"\partial", "∇": r"\nabla", "∧": r"\land", "∨": r"\lor",
    "¬": r"\neg", "…": r"\ldots", "⋯": r"\ldots", "ℏ": r"\hbar", "ℓ": r"\ell",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
    "α": r"\alpha", "β": r"\beta", "γ": r"\gamma", "δ": r"\delta", "ε": r"\epsilon", "ζ": r"\zeta", "η": r"\eta",
    "θ": r"\theta", "ι": r"\iota", "κ": r"\kappa", "λ": r"\lambda", "μ": r"\mu", "µ": r"\mu", "ν": r"\nu", "ξ": r"\xi",
    "π": r"\pi", "ρ": r"\rho", "σ": r"\sigma", "τ": r"\tau", "φ": r"\phi", "ϕ": r"\phi", "χ": r"\chi", "ψ": r"\psi",
    "ω": r"\omega", "Γ": r"\Gamma", "Δ": r"\Delta", "Θ": r"\Theta", "Λ": r"\Lambda", "Ξ": r"\Xi", "Π": r"\Pi",
    "Σ": r"\Sigma", "Φ": r"\Phi", "Ψ": r"\Psi", "Ω": r"\Omega",
}  # fmt: skip
CHARACTERS = {
    "\u2212": "-", "\u2010": "-", "\u2011": "-", "\u2013": "-", "\ufe63": "-", "\u2044": "/", "\u2215": "/", "∗": "*",
    "\u2018": "'", "\u2019": "'", "\u2032": "'", "\u2033": "''", "\u201c": '"', "\u201d": '"', "∣": "|", "∶": ":",
    "°": r"^\circ ", "º": r"^\circ ", "˚": r"^\circ ",
}  # fmt: skip
TABLE = str.maketrans(
    CHARACTERS
    | {char: f"{command} " for char, command in COMMANDS.items()}
    | {char: rf"\frac{{{top}}}{{{bottom}}}" for char, (top, bottom) in FRACTIONS.items()}
)
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni")
LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙₐₓ", "0123456789+-()nax")
SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+")
SUBSCRIPT = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙₐₓ]+")
RADICAND = r"\s*(?:\(([^()]*)\)|(?=(\{))|([0-9]+(?:\.[0-9]+)?|[A-Za-z]|\\[A-Za-z]+))"
ROOTS = [(re.compile(sign + RADICAND), command) for sign, command in (("√", ""), ("∛", "[3]"), ("∜", "[4]"))]


def latex(text: str) -> str:
    r"""`2√3` -> `2\sqrt{3}`, `x²` -> `x^{2}`, `1011₂` -> `1011_{2}`, `60°` -> `60^\circ `; canonical (NFC)."""
    if text.isascii():
        return text
    text = unicodedata.normalize("NFC", text)
    text = SUPERSCRIPT.sub(lambda run: f"^{{{run[0].translate(RAISED)}}}", text)
    text = SUBSCRIPT.sub(lambda run: f"_{{{run[0].translate(LOWERED)}}}", text).translate(TABLE)
    for root, degree in ROOTS:
        text = root.sub(lambda found, degree=degree: radical(found, degree), text)
    return text


def radical(found: re.Match, degree: str) -> str:
    bracketed, braced, single = found.groups()
    return rf"\sqrt{degree}" + ("" if braced else f"{{{single or bracketed or ''}}}")
