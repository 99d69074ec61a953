"""``python -m kxexplain``: the commands, as ``kxexplain`` runs them."""

from __future__ import annotations

from kxexplain.cli import app

if __name__ == "__main__":
    app(prog_name="kxexplain")
