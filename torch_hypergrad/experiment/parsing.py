"""Command line and YAML as a checked configuration, and one line for whatever is wrong with them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from .config import Config, ConfigError
from .keys import check_content, check_flag, shortened


def add_config(parser: ArgumentParser) -> None:
    """Gives a command every key of :class:`Config`, and ``--config`` for a YAML file of them."""
    parser.add_argument(
        "--config", action="config", help="YAML file with any of the keys below; what follows it overrides it"
    )
    parser.add_class_arguments(Config, as_group=True)


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Parsed arguments; for ``--help`` it prints and exits.

    Raises:
        ConfigError: one line, with the nearest valid name for an unknown key.
    """
    argv = [_at_home(word) for word in argv]
    try:
        _check_keys(argv)
        return parser.parse_args(argv)
    except ArgumentError as error:
        raise ConfigError(_one_line(str(error))) from error
    except RecursionError as error:
        raise ConfigError("A value is nested too deeply to be one of a configuration.") from error


def config_of(parser: ArgumentParser, arguments: Namespace) -> Config:
    """The checked configuration in the arguments of a command.

    Raises:
        ConfigError: one line.
    """
    from .checks import check  # knows the methods, and with them torch

    names = [f.name for f in fields(Config)]
    parts = (
        parser.instantiate(arguments)
        if hasattr(parser, "instantiate")
        else parser.instantiate_classes(arguments)
    )
    config = Config(**{name: parts[name] for name in names})
    check(config)
    return config


def read_config(path: Path) -> Config:
    """The checked configuration in a YAML file.

    Raises:
        ConfigError: one line.
    """
    parser = _config_parser()
    return config_of(parser, parse(parser, ["--config", str(path)]))


@cache
def _config_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    add_config(parser)
    return parser


def _at_home(word: str) -> str:
    """``--config=~/file``, which shells leave as it is."""
    name, _, value = word.partition("=")
    return f"{name}={Path(value).expanduser()}" if name == "--config" and value.startswith("~") else word


def _check_keys(argv: Sequence[str]) -> None:
    """The keys in YAML files and on the command line, before jsonargparse looks at their values."""
    for place, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name == "--config":
            file = Path(value if equals else "".join(argv[place + 1 : place + 2]))
            if file.is_file():
                check_content(_read_yaml(file), str(file))
        elif name.startswith("--") and len(name) > 2:
            check_flag(name[2:].rstrip("+"))


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        _checked_size(yaml.compose(text, Loader=yaml.SafeLoader), file, {})
        content = yaml.safe_load(text)
    except RecursionError as error:
        raise ConfigError(f"{file} is nested too deeply to be a configuration.") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{file} is no YAML: {_one_line(str(error))}") from error
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"{file} must hold sections such as data: and train:, got {shortened(content)}.")
    return content or {}


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
