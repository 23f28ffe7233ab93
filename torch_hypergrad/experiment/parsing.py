"""Command line and YAML as a checked configuration, and one line for whatever is wrong with them."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, get_loader

from .checks import check
from .config import NAMED, Config, ConfigError, Named, Tune
from .keys import SCHEMA, check_content, shortened
from .old import today

TUNE_KEYS = {f.name for f in fields(Tune)}


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
    parser.add_argument(
        "--config", type=str, help="YAML file with any of the keys below; what follows it overrides it"
    )
    parser.add_class_arguments(Config, as_group=True)


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
    try:
        flags = () if configured is None else configured._option_string_actions
        rest = argv if configured is None else _take_config(argv, content, files, flags)
        return Request(parser.parse_args(rest), content, files)
    except ArgumentError as error:
        raise ConfigError(_one_line(str(error))) from error
    except RecursionError as error:
        raise ConfigError("A value is nested too deeply to be one of a configuration.") from error


def config_of(content: Mapping[str, Any]) -> Config:
    """The checked configuration of these keys.

    Raises:
        ConfigError: one line.
    """
    parser = _config_parser()
    try:
        parsed = parser.parse_object({name: value for name, value in content.items() if name not in NAMED})
        parts = (
            parser.instantiate(parsed)
            if hasattr(parser, "instantiate")
            else parser.instantiate_classes(parsed)
        )
    except ArgumentError as error:
        raise ConfigError(_one_line(str(error))) from error
    named = {name: content.get(name, parts[name]) for name in NAMED}
    config = Config(**{f.name: named.get(f.name, parts[f.name]) for f in fields(Config)})
    check(config)
    return config


def config_with(content: Mapping[str, Any], settings: Mapping[str, Any]) -> Config:
    """The configuration with other values of some keys, by their paths.

    Raises:
        ConfigError: for keys and values that are none.
    """
    changed = copy.deepcopy(dict(content))
    for key, value in settings.items():
        given = _nested(key.split("."), value)
        check_content(given, "in the space")
        lay_over(changed, given)
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


@cache
def _config_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config, as_group=True)
    return parser


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
        if not flag.startswith("--") or path[-1] in ("help", ""):
            rest.append(word)
            continue
        if path[0] not in SCHEMA and flag in others and flag != "--config":
            rest.append(f"{word}=true" if word == "--print_config" else word)  # jsonargparse has one, too
            continue
        _check_spelling(path)
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"{flag} needs a value.")
            value = words.pop(0)
        if flag == "--config":
            files.append(Path(value).expanduser())
            given, where = _read_yaml(files[-1]), f"in {files[-1]}"
        else:
            given, where = _nested(path, _value(value, flag)), "on the command line"
        check_content(given, where)
        for section in {"tune", "space"} & set(given):
            if len(path) == 1:
                content.pop(section, None)  # all of it is given anew
        lay_over(content, given)
    return rest


def _check_spelling(path: Sequence[str]) -> None:
    """Flags of version 0.1 are refused with today's."""
    new = ["task", *path[1:]] if path[0] == "data" else list(path)
    if path[0] in NAMED and path[1:2] == ["options"]:
        new = [path[0], *path[2:]]
    if path == ["data", "name"]:
        new = ["task", "data"]
    if new != list(path):
        raise ConfigError(f"--{'.'.join(path)} is now --{'.'.join(new)}.")
    if path != ["config"]:
        check_content({path[0]: {}}, "on the command line")


def _nested(path: list[str], value: Any) -> dict[str, Any]:
    if path[0] == "space" and len(path) > 1:
        return {"space": {".".join(path[1:]): value}}
    if path[0] == "tune" and len(path) > 2:  # names of settings may hold dots
        last = [path[-1]] if len(path) > 3 or path[-1] in TUNE_KEYS else path[2:]
        name = ".".join(path[1 : -1 if last else None])
        return {"tune": {name: {last[0]: value}}}
    for part in reversed(path):
        value = {part: value}
    return value


def _value(text: str, flag: str) -> Any:
    try:
        return get_loader("yaml")(text) if text.strip() else text
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{flag}: {shortened(text)} is no value in YAML: {_one_line(str(error))}"
        ) from error


def lay_over(content: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Lays keys over those that are there. A name begins a named class anew; without one, arguments
    change."""
    defaults = Config()
    for section, value in given.items():
        if section in NAMED:
            content[section] = _named(content.get(section, getattr(defaults, section)), value)
        elif section == "tune" and isinstance(value, Mapping):
            there = content.setdefault("tune", {})
            for name, entry in value.items():
                there[name] = {**(there.get(name) or {}), **(entry or {})}
        elif isinstance(value, Mapping):
            content[section] = {**(content.get(section) or {}), **value}
        else:
            content[section] = value


def _named(before: Mapping[str, Any] | None, given: Any) -> Named | None:
    if isinstance(given, str):
        return {"name": given}
    if not isinstance(given, Mapping):
        return given
    if "name" in given or before is None:
        return dict(given)
    return {**before, **{key: _argument(before.get(key), value) for key, value in given.items()}}


def _argument(before: Any, given: Any) -> Any:
    """An argument that is a named class itself, such as a solver, is laid over likewise."""
    before = {"name": before} if isinstance(before, str) and isinstance(given, Mapping) else before
    return _named(before, given) if isinstance(before, Mapping) and "name" in before else given


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(f"--config {file} is no file.")
    try:
        text = file.read_text(encoding="utf-8")
        _checked_size(yaml.compose(text, Loader=yaml.SafeLoader), file, {})
        content = get_loader("yaml")(text)
    except RecursionError as error:
        raise ConfigError(f"{file} is nested too deeply to be a configuration.") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{file} is no YAML: {_one_line(str(error))}") from error
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"{file} must hold sections such as task: and train:, got {shortened(content)}.")
    return today(content or {})


MOST_VALUES = 10_000  # of a configuration, written out


def _checked_size(node: yaml.Node | None, file: Path, known: dict[int, int]) -> int:
    """How many values a node has when its aliases are written out.

    Raises:
        ConfigError: if these are too many, or a key is given twice.
    """
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        inner = node.value
        if isinstance(node, yaml.MappingNode):
            _check_once([key for key, _ in node.value], file)
            inner = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_checked_size(part, file, known) for part in inner)
        if known[id(node)] > MOST_VALUES:
            raise ConfigError(f"{file} has more than {MOST_VALUES} values, with its aliases written out.")
    return known[id(node)]


def _check_once(keys: Sequence[yaml.Node], file: Path) -> None:
    seen: set[str] = set()
    for key in keys:
        if isinstance(key, yaml.ScalarNode) and key.value in seen:
            line = key.start_mark.line + 1
            raise ConfigError(f"{file}, line {line}: {key.value} is given twice. Put both into one.")
        seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")


def _one_line(message: str) -> str:
    """A message of jsonargparse or YAML without line ends and the names of Python's types."""
    text = " ".join(message.split())
    for pattern, plain in REWORDED:
        text = re.sub(pattern, plain, text)
    return re.sub(r"\S{200,}", lambda found: f"{found[0][:77]}...", text)


def _choices(found: re.Match[str]) -> str:
    """``Expected a Literal[...]. Got value: x`` in plain words, with the nearest choice."""
    choices = re.findall(r"'([^']*)'", found[1])
    near = difflib.get_close_matches(found[2], choices, n=1)
    return f"expected one of {', '.join(choices)}; got {found[2]}." + (
        f" The nearest is {near[0]}." if near else ""
    )


REWORDED: tuple[tuple[str, Any], ...] = (
    (r"<class '(\w+)'>", lambda found: "null" if found[1] == "NoneType" else found[1]),
    (r"Problem with given class_path '[\w.]*': ", ""),
    (r'Parser key "([^"]+)":? ?', r"\1: "),
    (r"^error: ", ""),
    (
        r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] "
        r"Errors: .*?Given value type",
        lambda found: f"expected {found[1].replace(', null', ' or null')}. Type",
    ),
    (r"Type: \w+ Given value: (.*)$", r"Got \1."),
    (r"expected typing\.Literal\[([^\]]*)\] or null\. Got (.*)\.$", _choices),
    (r"Expected an? typing\.Literal\[([^\]]*)\]\. Got value: (.*)$", _choices),
    (r"Expected an? typing\.Literal\[([^\]]*)\]", r"\1"),
    (r'"<unicode string>"', "the text"),
)
