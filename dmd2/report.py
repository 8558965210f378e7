"""The HTML report of a run: one file without scripts or links, so that any viewer can show it."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

from dmd2.data.account import Account
from dmd2.evaluation.scores import REAL, sampled_image_sets, score_table
from dmd2.io.artifact import Manifest
from dmd2.io.local import write_text
from dmd2.model_card import best_checkpoint
from dmd2.training.metrics_log import SCORE, read_metrics

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: .6rem 0 } th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums } tr + tr { border-top: 1px solid #eee }
figure { display: inline-block; margin: .4rem 1.2rem .8rem 0 } figcaption { color: #555; font-size: .9rem }
figure.pixels img { image-rendering: pixelated; width: 29rem; max-width: 100% } img { max-width: 100% }
.accepted { color: #07713d } .rejected { color: #b3261e } code, pre { font: .85rem ui-monospace, monospace; overflow-x: auto }
"""


@dataclass(frozen=True)
class Panel:
    """A plot of training metrics over the steps."""

    title: str
    pattern: str
    """Regular expression that the whole name of a metric must match."""
    log_scale: bool = False


PANELS = (
    Panel("FID to training samples, at the checkpoints", SCORE),
    Panel("Learning rate", r".*/lr"),
    Panel("L1 norm of the gradient at the samples, by term", r".*_(grad_l1|gradient)", log_scale=True),
    Panel("Gradient norm of the weights, before clipping", r".*/grad_norm", log_scale=True),
    Panel("Skipped updates", r".*/skipped"),
    Panel("Losses of the student", r"student/.*"),
    Panel("Losses of the critic (dmd = denoising)", r"critic/.*"),
    Panel("Samples per second", r"samples_per_s"),
    Panel("Model FLOPs utilization (MFU)", r"mfu"),
    Panel("Peak memory, in GB", r"peak_memory_gb"),
    Panel("Time of a mean step by phase, in seconds", r"time/.*_s"),
    Panel("Other metrics", r"(?!(step|eta_s)$).*"),
)
"""The plots of a report. A metric belongs to the first panel that matches its name; a panel without metrics is left out."""


def write_report(path: Path, manifests: dict[str, Manifest], run: Path, evaluation: Path) -> None:
    """Write the report to `path`.

    Args:
        manifests: The manifests of the run's artifacts by kind; those of run, evaluation and gate are required.
        run: Local folder with the log and the previews of the run.
        evaluation: Local folder with the pictures of the evaluation.
    """
    config = manifests["run"].config
    assert config is not None
    gate = manifests["gate"].facts
    decision = escape(str(gate["decision"]))
    parts = [
        f"<h1>{escape(config.recipe)}</h1>",
        f'<p class="{decision}"><b>{decision.capitalize()}</b>: {escape(str(gate["reason"]))}.</p>',
        "<h2>Quality</h2>",
        _scores(manifests["evaluation"]),
        _pictures(manifests["evaluation"], evaluation),
        _account(manifests.get("shards")),
        "<h2>Training</h2>",
        f"<p>{escape(text)}</p>" if (text := best_checkpoint(manifests["run"])) else "",
        _curves(run),
        _previews(run),
        "<h2>Time</h2>",
        _times(manifests),
        "<h2>Recipe</h2>",
        f"<pre>{escape(json.dumps(config.model_dump(mode='json'), indent=1))}</pre>",
        "<h2>Provenance</h2>",
        _provenance(manifests),
    ]
    title = f"<title>{escape(config.recipe)}</title>"
    write_text(
        path,
        f'<!doctype html><html lang="en"><meta charset="utf-8">{title}<style>{STYLE}</style>{"".join(parts)}</html>\n',
    )


def _account(shards: Manifest | None) -> str:
    """What became of the files of the source; nothing if the shards are of a version that did not note it."""
    if shards is None or "account" not in shards.facts:
        return ""
    lines = Account.model_validate(shards.facts["account"]).lines()
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<h2>Data</h2><p>{escape(str(shards.facts['source']))}</p><ul>{items}</ul>"


def _scores(evaluation: Manifest) -> str:
    facts = evaluation.facts
    accuracy = (
        f", accuracy {facts['features_accuracy']:.1%} on the held-out images"
        if "features_accuracy" in facts
        else ""
    )
    note = (
        f"{facts['images']} images each against {facts['images_real']} held-out real ones. "
        f"Features: {facts['features']}{accuracy}. Seed {facts['seed']}."
    )
    if cut := facts.get("prompts_cut"):
        note += f" {cut} of {facts['prompts']} prompts are longer than the text encoder's window, which does not see the end of them."
    head, rows = score_table(facts)
    table = _table([escape(cell) for cell in head], [[escape(cell) for cell in row] for row in rows])
    return f"{table}<p>{escape(note)}</p>"


def _pictures(evaluation: Manifest, folder: Path) -> str:
    captions = {
        each.name: f"{each.title.capitalize()}, {each.calls} network call{'s' if each.calls > 1 else ''}"
        for each in sampled_image_sets(evaluation.facts)
    }
    captions[REAL] = "Held-out real images"
    return "".join(
        _figure((folder / f"{name}.png").read_bytes(), caption, pixels=True)
        for name, caption in captions.items()
    )


def _curves(run: Path) -> str:
    metrics = read_metrics(run)
    figures = [
        _plot(panel, {name: _series(metrics, name) for name in names})
        for panel, names in panel_metrics(metrics).items()
    ]
    return "".join(_figure(png, "") for png in figures)


def panel_metrics(metrics: list[dict[str, float]]) -> dict[Panel, list[str]]:
    """{panel: names of its metrics}, for the panels that have metrics, in the order of `PANELS`."""
    found: dict[Panel, list[str]] = {panel: [] for panel in PANELS}
    for name in dict.fromkeys(name for line in metrics for name in line):
        panel = next((panel for panel in PANELS if re.fullmatch(panel.pattern, name)), None)
        if panel:
            found[panel].append(name)
    return {panel: names for panel, names in found.items() if names}


def _previews(run: Path) -> str:
    """The first, the middle and the last preview."""
    paths = sorted((run / "previews").glob("*.png"))
    selected = [p for p in paths if p in (paths[0], paths[len(paths) // 2], paths[-1])]
    return "".join(
        _figure(p.read_bytes(), f"Student after step {int(p.stem)}", pixels=True) for p in selected
    )


def _times(manifests: dict[str, Manifest]) -> str:
    rows = []
    for kind, manifest in manifests.items():
        images = manifest.facts.get("images") if kind in ("teacher", "run") else manifest.facts.get("train")
        rate = f"{images / manifest.seconds:.0f}" if images and manifest.seconds else ""
        rows.append([escape(kind), f"{manifest.seconds:.1f}", rate])
    return _table(["artifact", "seconds", "images/s"], rows)


def _provenance(manifests: dict[str, Manifest]) -> str:
    rows = [[escape(kind), f"<code>{m.digest}</code>", str(len(m.files))] for kind, m in manifests.items()]
    versions = ", ".join(f"{name} {version}" for name, version in manifests["run"].versions.items())
    return _table(["artifact", "sha256 digest", "files"], rows) + f"<p>{escape(versions)}</p>"


def _table(head: list[str], rows: list[list[str]]) -> str:
    """The first column is text, the others are numbers."""

    def row(tag: str, cells: list[str]) -> str:
        return (
            "<tr>"
            + "".join(f"<{tag}{' class=n' if i else ''}>{cell}</{tag}>" for i, cell in enumerate(cells))
            + "</tr>"
        )

    return "<table>" + row("th", head) + "".join(row("td", cells) for cells in rows) + "</table>"


def _figure(png: bytes, caption: str, *, pixels: bool = False) -> str:
    data = base64.b64encode(png).decode()
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure{" class=pixels" if pixels else ""}><img alt="{escape(caption)}" src="data:image/png;base64,{data}">{text}</figure>'


def _plot(panel: Panel, series: dict[str, tuple[list[float], list[float]]]) -> bytes:
    """A PNG of {name: (steps, values)}."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(4.8, 2.7), dpi=110, layout="constrained")
    axes = figure.subplots()
    for name, (steps, values) in series.items():
        axes.plot(steps, values, label=name, linewidth=1.2)
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if panel.log_scale:
        axes.set_yscale("log")
    if len(series) > 1:
        axes.legend(fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _series(metrics: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of a metric, from the lines that have it."""
    lines = [line for line in metrics if name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]
