"""``python -m torch_sage``: the demo's command line; it needs the extra ``demo``."""

from __future__ import annotations


def main() -> None:
    """Run the command line, or name the library that is missing."""
    try:
        from torch_sage.demo.cli import app
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "torch_sage":
            raise
        raise SystemExit(
            f"python -m torch_sage needs {error.name}, which is not installed. Install the extra:\n"
            '  pip install "torch-sage[demo]"'
        ) from error
    app()


if __name__ == "__main__":
    main()
