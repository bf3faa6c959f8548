"""The version of this package, which goes into soups and into what the Hub is told."""

__version__ = "0.1.0"
