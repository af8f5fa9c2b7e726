"""Options of commands: dataclasses -> flags, a configuration file, and their values.

A group of options is a frozen dataclass with a ``title`` and fields made by `option`;
a command's options are a frozen dataclass whose fields are groups. The type of a field
says how its text is read: ``str``, ``int``, ``float``, ``bool``, ``Path``, a
``Literal`` of texts, ``X | None``, or ``tuple[X, ...]`` for several values.

Importing this imports neither torch nor transformers.
"""

import argparse
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

T = TypeVar("T")

PLAIN = ("help", "version")
"""Flags of every command that are no options of any."""
TRUE = ("true", "yes", "on", "1")
FALSE = ("false", "no", "off", "0")
NULLS = ("", "~", "null", "Null", "NULL")
"""Ways in which YAML writes that there is no value."""


class OptionError(ValueError):
    """An option that does not exist, or a value that it cannot have."""


def option(
    default: Any,
    help: str,
    *,
    metavar: str | None = None,
    shown: str | None = None,
    parse: Callable[[str], Any] | None = None,
    also: Sequence[str] = (),
    may_be_empty: bool = False,
) -> Any:
    """Declare a field of a group as an option.

    Args:
        default: The value where none is given; of several values a tuple.
        help: The option's description, with its unit; the default is appended.
        metavar: The value's name in the help.
        shown: The default in the help, where its value does not say it.
        parse: From the text of a value to the value. It raises ValueError with a
            message that begins with the text.
        also: Other names that are accepted, with ``_``.
        may_be_empty: Whether several values may be none.

    Returns:
        The field.
    """
    metadata = {
        "help": help,
        "metavar": metavar,
        "shown": shown,
        "parse": parse,
        "also": tuple(also),
        "may_be_empty": may_be_empty,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        group: The field of its group in the command's options.
        title: The title of its group.
        name: Its field in the group, which is its name in a configuration file.
        type: The type of one value.
        default: The value where none is given.
        several: Whether it takes several values.
        choices: The only texts that it takes; empty for any.
        metadata: The other arguments of `option`.
    """

    group: str
    title: str
    name: str
    type: Any
    default: Any
    several: bool
    choices: tuple[str, ...]
    metadata: Mapping[str, Any]

    @property
    def flag(self) -> str:
        """The flag as help shows it."""
        return _flag(self.name)

    @property
    def help(self) -> str:
        """The description with the default."""
        shown = self.metadata["shown"]
        if shown is None and self.type is bool:
            shown = "yes" if self.default else None
        elif shown is None and self.several:
            shown = " ".join(map(_text, self.default)) or None
        elif shown is None and self.default is not None:
            shown = _text(self.default)
        return self.metadata["help"] + (f" (default: {shown})" if shown else "")

    @property
    def invocation(self) -> str:
        """The flag and its value as help shows them."""
        if self.type is bool:
            off = f", {_flag('no_' + self.name)}" if self.default else ""
            return self.flag + off
        value = self.metadata["metavar"] or self.name.upper()
        if self.choices:
            value = "{" + ",".join(self.choices) + "}"
        if self.several:
            value = (
                f"[{value} ...]" if self.metadata["may_be_empty"] else f"{value} ..."
            )
        return f"{self.flag} {value}"

    def value(self, texts: Sequence[str]) -> Any:
        """Read the value.

        Args:
            texts: What was given, one text for each value.

        Returns:
            The value; of several values a tuple.

        Raises:
            ValueError: If it is none.
        """
        values = [self._one(text) for text in texts]
        if self.several:
            return tuple(values)
        if len(values) != 1:
            raise ValueError(f"{' '.join(texts)!r} are several values; it takes one.")
        return values[0]

    def _one(self, text: str) -> Any:
        parse: Callable[[str], Any] | None = self.metadata["parse"]
        if parse is not None:
            return parse(text)
        if self.choices:
            if text in self.choices:
                return text
            near = nearest(text, self.choices)
            raise ValueError(f"{text!r} is none of {', '.join(self.choices)}.{near}")
        if self.type is bool:
            return _truth(text)
        wanted = {int: "a whole number", float: "a number"}.get(self.type)
        try:
            return self.type(text)
        except ValueError:
            raise ValueError(f"{text!r} must be {wanted}.") from None


def positive(text: str) -> int:
    """Read a whole number of at least 1.

    Args:
        text: The text of a value.

    Returns:
        The number.

    Raises:
        ValueError: If it is none.
    """
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} must be a whole number of at least 1.")
    return int(text)


def above_zero(text: str) -> float:
    """Read a finite number above 0.

    Args:
        text: The text of a value.

    Returns:
        The number.

    Raises:
        ValueError: If it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{text!r} must be a number above 0.")
    return value


def options_of(command: type) -> list[Option]:
    """Return a command's options in the order of its groups.

    Args:
        command: The dataclass of the command's options.
    """
    found = []
    for group, kind in _groups(command).items():
        hints = typing.get_type_hints(kind)
        for each in fields(kind):
            found.append(_option(group, kind.title, each, hints[each.name]))
    return found


def parse_options(
    command: type[T],
    given: Sequence[str],
    *,
    usage: str = "",
    description: str = "",
    epilog: str = "",
) -> T:
    """Read the options of a command: flags win over the configuration file.

    Args:
        command: The dataclass of the command's options.
        given: The command's arguments.
        usage: The line of help that says how the command is called.
        description: The help's first paragraph.
        epilog: The help's last paragraph.

    Returns:
        The options.

    Raises:
        OptionError: If an option does not exist or cannot have its value, or the
            configuration file cannot be read.
        SystemExit: After ``--help`` or ``--version``.
    """
    options = options_of(command)
    names = _names(options)
    parser = _parser(options, usage, description, epilog)
    flags = _flags(parser, names, given)
    values = {
        name: _value(names[name], texts, names[name].flag)
        for name, texts in flags.items()
    }
    if values.get("config") is not None:
        file = Path(values["config"])
        for key, texts in _from_file(file, names).items():
            each = names[key]
            if each.name not in flags and (texts or each.metadata["may_be_empty"]):
                values[each.name] = _value(
                    each, texts, f"--config {str(file)!r}: {key}"
                )
    groups = {
        group: kind(
            **{
                o.name: values[o.name]
                for o in options
                if o.group == group and o.name in values
            }
        )
        for group, kind in _groups(command).items()
    }
    return command(**groups)


def version() -> str:
    """Return the name and version of the package."""
    from importlib import metadata

    return f"rocoft-ntk {metadata.version('rocoft-ntk')}"


def nearest(text: str, known: Sequence[str]) -> str:
    """Return a question for the nearest known text, empty if none is near.

    Args:
        text: What was given.
        known: What could have been meant.
    """
    import difflib

    # What all have in front would make them alike.
    bare = {each.lstrip("-"): each for each in known}
    near = difflib.get_close_matches(text.lstrip("-"), bare, n=1)
    return f" Did you mean {bare[near[0]]}?" if near else ""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without usage."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message.removeprefix('argument ')}. See --help.")


class _Help(argparse.HelpFormatter):
    """Help that shows each option as `Option.invocation` does."""

    def __init__(self, prog: str, **more: Any) -> None:
        super().__init__(prog, max_help_position=26, **more)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action.metavar, str):
            return action.metavar
        return super()._format_action_invocation(action)


class _Version(argparse.Action):
    """Print the version, which takes a while to find out, only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(version())  # noqa: T201
        parser.exit()


def _parser(
    options: Sequence[Option], usage: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    parser = _Parser(
        usage=usage.replace("%", "%%") or None,
        description=description,
        epilog=epilog,
        formatter_class=_Help,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="show the version and exit"
    )
    groups: dict[str, Any] = {}
    for each in options:
        if each.title not in groups:
            groups[each.title] = parser.add_argument_group(each.title)
        # Values are read by `Option.value`, those of a file as those of flags.
        several: dict[str, Any] = {"nargs": "+"} if each.several else {"nargs": 1}
        if each.metadata["may_be_empty"]:
            several = {"nargs": "*"}
        if each.type is bool:
            several = {"nargs": "?", "const": TRUE[0]}
        groups[each.title].add_argument(
            each.flag,
            dest=each.name,
            metavar=each.invocation,
            help=each.help.replace("%", "%%"),
            **several,
        )
    return parser


def _flags(
    parser: argparse.ArgumentParser, names: Mapping[str, Option], given: Sequence[str]
) -> dict[str, list[str]]:
    """Return the texts that were given, by the name of the option."""
    plain = [_plain(text, names) for text in given]
    found, unknown = parser.parse_known_args(plain)
    if unknown:
        flags = [text for text in unknown if text.startswith("-")]
        if not flags:
            raise OptionError(f"{unknown[0]!r} belongs to no option. See --help.")
        flag = flags[0].partition("=")[0]
        # --no-x is worth a hint where x is the default.
        hints = [n for n, o in names.items() if o.default or not n.startswith("no_")]
        near = nearest(_flag(flag.strip("-")), [*map(_flag, (*hints, *PLAIN))])
        raise OptionError(f"{flag} is no option.{near} See --help.")
    return {
        name: [texts] if isinstance(texts, str) else texts
        for name, texts in vars(found).items()
    }


def _plain(text: str, names: Mapping[str, Option]) -> str:
    """Return an argument with the flag that the parser knows an option by."""
    if not text.startswith("--"):
        return text
    flag, equals, value = text.partition("=")
    name = flag.removeprefix("--").replace("-", "_")
    if name not in names:
        return text
    each = names[name]
    if each.type is bool and name == f"no_{each.name}":
        if equals:
            raise OptionError(f"{flag} takes no value.")
        return f"{each.flag}={FALSE[0]}"
    return each.flag + equals + value


def _from_file(file: Path, names: Mapping[str, Option]) -> dict[str, list[str]]:
    """Return the texts of a configuration file, by its keys as names."""
    import yaml

    source = f"--config {str(file)!r}"
    try:
        text = file.read_text(encoding="utf-8")
        # As texts, like flags: YAML would make True of the label word Yes.
        values = yaml.load(text, yaml.BaseLoader) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise OptionError(f"{source} cannot be read: {reason}") from None
    if not isinstance(values, dict):
        raise OptionError(f"{source} must map options to values.")
    known = [
        name
        for name, each in names.items()
        if each.name != "config" and not name.startswith("no_")
    ]
    found: dict[str, list[str]] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = nearest(name, known)
            raise OptionError(f"{source}: {key!r} is no option.{near} See --help.")
        if isinstance(value, dict) or (
            isinstance(value, list) and not all(isinstance(v, str) for v in value)
        ):
            raise OptionError(f"{source}: {key} must be a value or a list of values.")
        if isinstance(value, list):
            found[name] = value
        elif value not in NULLS:
            found[name] = [value]
    return found


def _value(each: Option, texts: Sequence[str], source: str) -> Any:
    try:
        return each.value(texts)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise OptionError(f"{source}: {reason} See --help.") from None


def _groups(command: type) -> dict[str, Any]:
    hints = typing.get_type_hints(command)
    return {each.name: hints[each.name] for each in fields(command)}


def _names(options: Sequence[Option]) -> dict[str, Option]:
    """Return the options by each of their names, with ``_``."""
    found: dict[str, Option] = {}
    for each in options:
        off = [f"no_{each.name}"] if each.type is bool else []
        for name in (each.name, *each.metadata["also"], *off):
            assert name not in found, f"two options are called {name}"
            found[name] = each
    return found


def _option(group: str, title: str, each: Any, hint: Any) -> Option:
    """Return the option that a field with a type declares."""
    several, choices = False, ()
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        several, hint = True, typing.get_args(hint)[0]
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
    return Option(
        *(group, title, each.name, hint, each.default, several, choices),
        metadata=each.metadata,
    )


def _truth(text: str) -> bool:
    if text.lower() in TRUE:
        return True
    if text.lower() in FALSE:
        return False
    raise ValueError(f"{text!r} is neither true nor false.")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
