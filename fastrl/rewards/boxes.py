r"""The answer of a text: what its last balanced \boxed{...} holds, or its last boxes if they state several answers."""

import re

TAIL = 65536  # characters of the text that are searched for a box, from the end

# `\\` and `\{` are one token each, so that neither opens or closes anything; `\\boxed` is a box all the same
TOKEN = re.compile(r"\\boxed(?![A-Za-z])\s*\{|\\boxed\s+(?P<bare>[^\s{}$\\]+)|\\(?!\\boxed)[\\{}]|[{}]")
# between two boxes that are answers of one list; anything else begins another try
LISTED = re.compile(
    r"(?:\s|\$|\\[()\[\],;: ]|\\q?quad|~)*"
    r"(?:,|;|(?:,\s*)?(?:\\text\s*\{\s*)?\b(?:and|or)\b(?:\s*\})?)"
    r"(?:\s|\$|\\[()\[\],;: ]|\\q?quad|~)*"
    r"(?:\\?[A-Za-z]+(?:_(?:\w|\{\w+\}))?\s*=\s*)?"
)
MAX_BETWEEN = 60


def last_box(text: str) -> str | None:
    r"""Content of the last balanced \boxed{...} or `\boxed 6`, else None; one pass over the last TAIL characters.

    Boxes with nothing but `and`, `or` or a comma between them are one list: `$x=\boxed{1}$ or $x=\boxed{2}$` -> `1, 2`.
    With any other words between them the last one alone is the answer.
    """
    text = text[-TAIL:]
    if "\\boxed" not in text:
        return None
    boxes = closed_boxes(text)
    if not boxes:
        return None
    listed = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        between = text[box[1] : listed[-1][0]]
        if len(between) > MAX_BETWEEN or "\n\n" in between or not LISTED.fullmatch(between):
            break
        listed.append(box)
    contents = list(dict.fromkeys(content.strip() for _, _, content in reversed(listed)))
    return ", ".join(contents) if all(contents) else contents[-1]


def closed_boxes(text: str) -> list[tuple[int, int, str]]:
    """Start, end and content of every closed box, by their start."""
    boxes = []
    open_braces: list[tuple[int, int] | None] = []  # of a box: where it and its content start
    for token in TOKEN.finditer(text, text.index("\\boxed")):
        if token["bare"]:
            boxes.append((token.start(), token.end(), token["bare"].rstrip(".,;:")))
        elif token[0] == "}":
            box = open_braces.pop() if open_braces else None
            if box is not None:
                boxes.append((box[0], token.end(), text[box[1] : token.start()]))
        elif token[0][-1] == "{" and token[0] != "\\{":
            open_braces.append((token.start(), token.end()) if token[0] != "{" else None)
    return sorted(boxes)
