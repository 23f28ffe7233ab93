"""Command line and YAML as a checked configuration, and one line for whatever is wrong with them."""

from __future__ import annotations

import copy
import re
from argparse import SUPPRESS
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, get_loader

from .checks import check
from .config import NAMED, Config, ConfigError
from .messages import one_line, shortened
from .old import check_flag, today
from .options import section

DEFAULTS = asdict(Config())


@dataclass(frozen=True)
class Request:
    """What the words of a command ask for.

    Args:
        arguments: those of the command itself.
        content: the keys of a configuration, from files and flags, in their order.
        files: the YAML files.
    """

    arguments: Namespace
    content: dict[str, Any]
    files: list[Path]


def add_config(parser: ArgumentParser) -> None:
    """Gives the help of a command ``--config`` and every key of :class:`Config`."""
    meaning = "YAML file with any of the keys below; what follows it overrides it"
    parser.add_argument("--config", type=str, help=meaning)
    parser.add_class_arguments(Config, as_group=True)
    for action in parser._actions:
        if action.help == "Path to a configuration file.":  # of a section alone, which --config does
            action.help = SUPPRESS


def parse(parser: ArgumentParser, argv: Sequence[str], configured: ArgumentParser | None) -> Request:
    """Parsed words; for ``--help`` it prints and exits.

    Args:
        parser: of the whole command line.
        argv: its words.
        configured: of the command, if it takes a configuration.
    Raises:
        ConfigError: one line, with the nearest valid name for an unknown key.
    """
    content: dict[str, Any] = {}
    files: list[Path] = []
    flags = () if configured is None else configured._option_string_actions
    rest = argv if configured is None else _take_config(argv, content, files, flags)
    try:
        return Request(parser.parse_args(rest), content, files)
    except ArgumentError as error:
        told = one_line(error).removeprefix("error: ")
        told = re.sub(
            r"Does not validate .*Subtypes: (.*) Errors: .*Given value: ", r"Expected \1. Got ", told
        )
        told = re.sub(r"<class '(\w+)'>", r"\1", told).replace("NoneType", "null")
        raise ConfigError(re.sub(r'Parser key "[^"]*?(\w+)"', r"--\1", told)) from error


def config_of(content: Mapping[str, Any]) -> Config:
    """The checked configuration of these keys.

    Raises:
        ConfigError: one line.
    """
    config = section(Config, content)
    check(config)
    return config


def config_with(content: Mapping[str, Any], settings: Mapping[str, Any]) -> Config:
    """The configuration with other values of some keys, by their paths.

    Raises:
        ConfigError: for keys and values that are none.
    """
    changed = copy.deepcopy(dict(content))
    for key, value in settings.items():
        lay_over(changed, _nested(key.split("."), value))
    return config_of(changed)


def read_config(path: Path) -> Config:
    """The checked configuration in a YAML file.

    Raises:
        ConfigError: one line.
    """
    content: dict[str, Any] = {}
    _take_config(["--config", str(path)], content, [], ())
    return config_of(content)


def as_yaml(config: Config) -> str:
    """All keys, in their order."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def class_asked_for(argv: Sequence[str]) -> tuple[str, str] | None:
    """Section and name in ``--method.help Implicit``; the name is empty where there is none."""
    for place, word in enumerate(argv):
        if HELP.fullmatch(word):
            return word[2:].removesuffix(".help"), "".join(argv[place + 1 : place + 2])
    return None


HELP = re.compile(rf"--({'|'.join(NAMED)})(\.\w+)*\.help")


# ---- words into keys ---------------------------------------------------------------------------------------


def _take_config(
    argv: Sequence[str], content: dict[str, Any], files: list[Path], others: Collection[str]
) -> list[str]:
    """Puts files and flags of a configuration into ``content``; returns the words that are left.

    Args:
        others: flags of the command itself.
    """
    rest, words = [], list(argv)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        path = flag[2:].split(".")
        of_command = flag in others and path[0] not in (*DEFAULTS, "config")
        if not flag.startswith("--") or path[-1] in ("help", "") or of_command:
            rest.append(f"{word}=true" if word == "--print_config" else word)  # jsonargparse has one, too
            continue
        check_flag(path)
        if path != ["config"]:
            section(Config, {path[0]: DEFAULTS.get(path[0])})  # whether there is such a key
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"{flag} needs a value.")
            value = words.pop(0)
        if path == ["config"]:
            files.append(Path(value).expanduser())
            given, where = _read(files[-1]), f"{files[-1]}: "
        else:
            given, where = _nested(path, _loaded(value, f"{flag}={shortened(value)}")), ""
        for whole in {"tune", "space"} & set(given) if len(path) == 1 else ():
            content.pop(whole, None)
        lay_over(content, given)
        try:
            section(Config, content)
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from error
    return rest


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(f"--config {file} is no file.")
    try:
        given = _loaded(file.read_text(encoding="utf-8"), str(file)) or {}
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{file} is no YAML: {one_line(error)}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{file} must hold sections such as task: and train:, got {shortened(given)}.")
    return today(given)


def _nested(path: list[str], value: Any) -> dict[str, Any]:
    head, *rest = path
    if head == "space" and rest:
        rest = [".".join(rest)]
    if head == "tune" and len(rest) > 1:  # names of settings may hold dots
        rest = [".".join(rest[:-1]), rest[-1]]
    for part in reversed(rest):
        value = {part: value}
    return {head: value}


def lay_over(content: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Lays keys over those that are there. A name begins a named class anew; without one, arguments
    change."""
    for name, value in given.items():
        before = content.get(name, DEFAULTS.get(name))
        if name in NAMED:
            value = _class(before or {"name": None}, value)
        elif isinstance(before, Mapping) and isinstance(value, Mapping):
            if name == "tune":
                value = {tuned: _keys(before.get(tuned), keys) for tuned, keys in value.items()}
            value = {**before, **value}
        content[name] = value


def _keys(before: Any, given: Any) -> Any:
    """Of what is tuned, where null is a section without keys."""
    given = {} if given is None else given
    return {**(before or {}), **given} if isinstance(given, Mapping) else given


def _class(before: Any, given: Any) -> Any:
    """A class with its arguments, of which one may be a class itself, as a solver is; else what is given."""
    if isinstance(before, str) and isinstance(given, Mapping):
        before = {"name": before}
    if not isinstance(before, Mapping) or "name" not in before:
        return given
    if isinstance(given, str):
        return {"name": given}
    if not isinstance(given, Mapping) or "name" in given:
        return given
    return {**before, **{key: _class(before.get(key), value) for key, value in given.items()}}


# ---- YAML --------------------------------------------------------------------------------------------------


def _loaded(text: str, where: str) -> Any:
    """The value of a text in YAML.

    Raises:
        ConfigError: if it is none, has too many values or too deep ones, or a key twice.
    """
    try:
        _size(yaml.compose(text, Loader=yaml.SafeLoader), where, {})
        return get_loader("yaml")(text) if text.strip() else text
    except RecursionError as error:
        raise ConfigError(f"{where} is nested too deeply to be a configuration.") from error
    except yaml.YAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise ConfigError(f"{where}{line} is no YAML: {getattr(error, 'problem', None) or error}.") from error


MOST_VALUES = 10_000  # of a configuration, written out


def _size(node: yaml.Node | None, where: str, known: dict[int, int]) -> int:
    """How many values a node has when its aliases are written out. Raises as :func:`_loaded`."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        pairs = node.value if isinstance(node, yaml.MappingNode) else [(part,) for part in node.value]
        seen: set[str] = set()
        for key in [pair[0] for pair in pairs if len(pair) == 2 and isinstance(pair[0], yaml.ScalarNode)]:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise ConfigError(f"{where}, line {line}: {key.value} is given twice. Put both into one.")
            seen.add(key.value)
        known[id(node)] = 1 + sum(_size(part, where, known) for pair in pairs for part in pair)
        if known[id(node)] > MOST_VALUES:
            raise ConfigError(f"{where} has more than {MOST_VALUES} values, with its aliases written out.")
    return known[id(node)]
