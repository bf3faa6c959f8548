"""The command line: a file a command, which brings its own options."""

from hf_soup.cli.app import cli, main, run

__all__ = ["cli", "main", "run"]
