"""Options of a command in a TOML file: `--recipe FILE`. What is typed beside it counts more."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from madkernels.names import did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _take(context: typer.Context, file: Path | None) -> Path | None:
    """Makes the file's values the defaults of the other options, which are looked at later."""
    if file is None or context.resilient_parsing:
        return file
    try:
        given = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--recipe: {file} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--recipe: {file} is no TOML: {error}") from None
    known = [str(option.name).replace("_", "-") for option in context.command.params if option.name != "recipe_file"]
    for key in given:
        if key.replace("_", "-") not in known:
            meant = did_you_mean(key.replace("_", "-"), known) or f"; it takes {', '.join(known)}"
            raise ValueError(f"--recipe: {file} has {key!r}, which is no option of this command{meant}")
    context.default_map = {key.replace("-", "_"): _typed(value) for key, value in given.items()}
    return file


def _typed(value: Any) -> Any:
    """As on the command line, where true is no number."""
    return [str(item) for item in value] if isinstance(value, list) else str(value)


RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe", callback=_take, is_eager=True, help="TOML file of options, such as lr = 3e-3; what is typed counts more."
    ),
]


def write(context: typer.Context, folder: Path) -> None:
    """Leaves in a folder, as `recipe.toml`, the options that a command ran with, so that `--recipe` does it again.

    Raises:
        OSError: it could not be written; one that was there still is.
    """
    apart = ("recipe_file", "out", "dry_run", "help")
    names = [str(option.name) for option in context.command.params if option.name not in apart]
    given = {name: context.params[name] for name in names if context.params.get(name) is not None}
    lines = [f"{name.replace('_', '-')} = {_toml(value)}" for name, value in given.items()]
    whole = folder / "recipe.unfinished"
    whole.write_text("\n".join(lines) + "\n", encoding="utf-8")
    whole.rename(folder / "recipe.toml")


def _toml(value: Any) -> str:
    """Strings, numbers, booleans and lists are the same in JSON, but for numbers that are none."""
    if (isinstance(value, float) and value != value) or value in (float("inf"), -float("inf")):
        return str(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
