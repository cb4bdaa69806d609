"""The version, where the build and the package itself read it."""

__version__ = "0.1.0"
