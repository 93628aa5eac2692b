"""Configurations in JSON and YAML files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any


def read_file(path: Path) -> Any:
    """Parses a JSON or YAML file.

    Raises:
        ValueError: naming the file, for a directory, another suffix, a syntax error or a key given
            twice.
    """
    if path.is_dir():
        raise ValueError(f"{path}: a configuration must be a file, got a directory")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=_unique)
        if path.suffix in (".yaml", ".yml"):
            return _parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    raise ValueError(f"{path}: a configuration must end in .json, .yaml or .yml")


def _parse_yaml(text: str) -> Any:
    """Parses YAML, refusing keys given twice (PyYAML keeps the last one silently)."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: Any, node: Any) -> dict[str, Any]:
        loader.flatten_mapping(node)
        return _unique(loader.construct_pairs(node, deep=True))

    # YAML 1.2 has 1e-1 among its numbers; to PyYAML, which reads 1.1, it is text.
    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds a dict, refusing the second of two equal keys."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} is given twice")
        result[key] = value
    return result
