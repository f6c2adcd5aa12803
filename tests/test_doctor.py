"""What `limbeck doctor` says of a machine is what this process does on it."""

from __future__ import annotations

from typer.testing import CliRunner

from limbeck.cli import app
from limbeck.ops.products import onednn_wins, packable, packing_pays


def test_doctor_tells_which_products_are_taken() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    lines = dict(line.split(maxsplit=1) for line in result.output.splitlines() if line.split(maxsplit=1)[1:])
    assert lines["products"].startswith("float32 by oneDNN" if onednn_wins() else "float32 by torch itself")
    kept = [str(dtype).removeprefix("torch.") for dtype in packable() if packing_pays(dtype)]
    assert lines["writing"].endswith(": " + (", ".join(kept) or "none"))
