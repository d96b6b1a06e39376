"""lm-eval on packed checkpoints in transformers: ``python -m dialect_plugin.lm_eval run ...``.

The same command as ``lm-eval``, with the same arguments; only :mod:`dialect_plugin.transformers` is
imported before it. vLLM loads its plugins itself, and a served model needs none, so that those two
work with ``lm-eval`` as well.
"""

from __future__ import annotations

import sys
from importlib import import_module

from .scheme import SentenceError


def _main() -> int:
    """Run lm-eval's command line; the exit status."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        print(
            "lm-eval is not installed; install it with pip install 'blockdialect[lm-eval]'",
            file=sys.stderr,
        )
        return 1
    import_module("dialect_plugin.transformers")  # for what importing it registers
    try:
        cli_evaluate()
    except SentenceError as error:
        print(f"lm-eval: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
