"""Make self-contained HTML pages from templates, and check their path before any long work."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from edgeq.errors import ConfigError


def require_path(path: Path, example: str) -> None:
    """Refuse a path that no page can be written to.

    Args:
        path: of the option --html.
        example: a file name to suggest.

    Raises:
        ConfigError: the path is a folder, or its folder does not exist.
    """
    if path.is_dir():
        raise ConfigError(f"--html: {path} is a folder; a file is needed. Give {path / example}, for one.")
    if not path.parent.is_dir():
        raise ConfigError(f"--html: the folder {path.parent} is not there. Make it, or choose another.")


def environment(package: str) -> Environment:
    """Give a Jinja environment with the templates of a package: HTML is escaped, and undefined names raise.

    Args:
        package: whose folder `templates` is read.
    """
    return Environment(
        loader=PackageLoader(package),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
