"""The versions that the hooks were tested with: `make matrix` runs them, docs/compatibility.md has the results."""

# The oldest of these is the lower bound in pyproject.toml.
TESTED: tuple[str, ...] = ("4.57.6",)
