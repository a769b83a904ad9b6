"""What the value of a setting may be: the types of a recipe, text that can name something, nothing secret."""

import os
import re
import types
import typing
from collections.abc import Sequence

from fastrl.base.setting import flag_of, settings_of

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

PROSE = ("instruction", "args", "template_args")  # fields of free text
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
MAX_TEXT, MAX_PART = 1000, 255  # characters of a setting, and bytes between its slashes: what file systems take
SECRET = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)")  # in names of variables


def check_type(where: str, value: object, hint: object) -> None:
    """Raise ValueError unless a TOML value is what a field is annotated with: "1e-6" in quotes is no number."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value == "None":
            return
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    is_tuple = typing.get_origin(hint) is tuple
    values = value if is_tuple and isinstance(value, list) else [value]
    hint = typing.get_args(hint)[0] if is_tuple else hint
    kind = str if typing.get_origin(hint) is typing.Literal else hint
    said = {bool: "true or false", int: "a whole number", float: "a number", str: "text in quotes"}[kind]
    for each in values:
        if type(each) is not kind and not (kind is float and type(each) is int):
            raise ValueError(f"{where} must be {'a list of these: ' * is_tuple}{said}, got {each!r:.100}")
        if isinstance(each, str) and each.startswith("--"):  # it would be read as a flag
            raise ValueError(f"{where} must not begin with --, got {each!r:.100}")


def refuse_secrets(args: Sequence[str], source: str) -> None:
    """Raise ValueError, without repeating it, where an argument holds a secret: the run folder keeps all of them."""
    for i, arg in enumerate(args):
        if name := secret_in(arg):
            flag = next((a.partition("=")[0] for a in reversed(args[: i + 1]) if a.startswith("--")), "an argument")
            raise ValueError(
                f"{source}: {flag} holds the value of {name}, which the run folder would show; take it out"
            )


def secret_in(text: str) -> str | None:
    """The environment variable whose value, by its name a secret, stands in a text."""
    secrets = {name: value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= 8}
    return next((name for name, value in secrets.items() if value in text), None)


def check_texts(config: "DataclassInstance") -> None:
    """Raise ValueError on a setting that no file, data set or model can be called by: the text may reach the system."""
    for path, field, value in settings_of(config):
        for text in value if isinstance(value, tuple) else (value,):
            if not isinstance(text, str) or field.name in PROSE:
                continue
            if CONTROL.search(text):
                raise ValueError(f"{flag_of(path)} has a control character in {text!r:.100}")
            if len(text) > MAX_TEXT or max(len(part.encode(errors="replace")) for part in text.split("/")) > MAX_PART:
                raise ValueError(f"{flag_of(path)} is too long, {len(text)} characters: {text[:50]!r}...")
