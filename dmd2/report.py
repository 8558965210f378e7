"""The HTML report of a run: one file without scripts or links, so that any viewer can show it."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmd2.data.account import Account
from dmd2.evaluation.scores import (
    REAL,
    REAL_IMAGES,
    MetricScores,
    read_scores,
    sampled_image_sets,
    score_table,
)
from dmd2.image_grid import BORDER
from dmd2.io.artifact import Manifest
from dmd2.io.local import write_text
from dmd2.model_card import best_checkpoint
from dmd2.training.metrics_log import SCORE, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --soft: #666; --line: #ddd }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --paper: #17191c; --soft: #999; --line: #3a3d42 } .plot img { filter: invert(1) hue-rotate(180deg) }
  .accepted { color: #4cc38a !important } .rejected { color: #ff7a70 !important } .open { color: #e0b252 !important }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 64rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line) }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: .6rem 0 }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums } tr + tr { border-top: 1px solid var(--line) }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: .8rem 1.2rem }
.cells { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .8rem 1rem }
figure { margin: 0 } figcaption { color: var(--soft); font-size: .9rem } img { width: 100%; height: auto; display: block }
figure.pixels img { image-rendering: pixelated; max-width: 29rem }
.accepted { color: #07713d } .rejected { color: #b3261e } .open { color: #8a5a00 }
code, pre { font: .85rem ui-monospace, monospace; overflow-x: auto; overflow-wrap: anywhere } pre { overflow-wrap: normal }
"""
CLASSES = {"accepted": "accepted", "rejected": "rejected"}
"""{decision: its class in the page}; of others it is `open`."""
CELL, SMALL_CELL = 512, 128
"""Pixels of an image with a caption of its own at most; width from which on it is not enlarged pixel by pixel."""
SHOWN_TEXTS = 12
"""Texts whose pictures are shown beside them, at most."""
LARGEST_PNG = 250_000
"""Bytes of a picture from which on the page holds a JPEG of it, at most `THUMBNAIL` pixels wide; the original is in its artifact."""
THUMBNAIL, QUALITY = 1600, 85
DPI = 220
"""Of the plots: twice the pixels at which they are shown, for screens of phones."""


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


def write_report(
    path: Path, manifests: dict[str, Manifest], run: Path, evaluation: Path, start: Path | None = None
) -> None:
    """Write the report to `path`.

    Args:
        manifests: The manifests of the run's artifacts by kind; those of run, evaluation and gate are required.
        run: Local folder with the log and the previews of the run.
        evaluation: Local folder with the pictures of the evaluation.
        start: Local folder with the log and the previews of the run that this one started from, if it did.
    """
    config = manifests["run"].config
    assert config is not None
    gate = manifests["gate"].facts
    decision = escape(str(gate["decision"]))
    parts = [
        f"<h1>{escape(config.recipe)}</h1>",
        f'<p class="{CLASSES.get(decision, "open")}"><b>{decision.capitalize()}</b>: {escape(str(gate["reason"]))}.</p>',
        _conditions(gate),
        "<h2>Quality</h2>",
        _scores(manifests["evaluation"]),
        _pictures(manifests["evaluation"], evaluation),
        _pictures_by_prompt(manifests["evaluation"], evaluation),
        _nearest(manifests["evaluation"], evaluation),
        _lowest_clip(manifests["evaluation"], evaluation),
        _account(manifests.get("shards")),
        _training("First stage", manifests["start"], start) if start else "",
        _training("Training", manifests["run"], run),
        _package(manifests["package"]) if "package" in manifests else "",
        "<h2>Time</h2>",
        _times(manifests),
        "<h2>Recipe</h2>",
        f"<pre>{escape(json.dumps(config.model_dump(mode='json'), indent=1))}</pre>",
        "<h2>Provenance</h2>",
        _provenance(manifests),
    ]
    _write_page(path, config.recipe, parts)


def write_progress(path: Path, title: str, lines: list[str], run: Path) -> None:
    """Write a page about a training that still goes on, or that failed.

    Args:
        lines: What there is to say about it.
        run: Local folder with its log and its previews up to now.
    """
    told = [f"<p>{escape(line)}</p>" for line in lines]
    at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    parts = [f"<h1>{escape(title)}</h1>", *told, f"<p>As of {at}.</p>", _previews(run), _curves(run)]
    _write_page(path, title, parts)


def _write_page(path: Path, title: str, parts: list[str]) -> None:
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
    write_text(path, f'<!doctype html><html lang="en">{head}<style>{STYLE}</style>{"".join(parts)}</html>\n')


def _training(title: str, of: Manifest, folder: Path) -> str:
    """Recipe, curves and previews of a run; an adopted one has neither curves nor previews."""
    assert of.config is not None
    adopted, steps = of.facts.get("adopted"), of.facts.get("steps")
    made = f", adopted from {adopted}" if adopted else f", {steps:,} steps" if steps else ""
    lines = [f"{of.config.recipe}{made}.", best_checkpoint(of)]
    text = "".join(f"<p>{escape(line)}</p>" for line in lines if line)
    curves = "" if adopted else _curves(folder) + _previews(folder)
    return f"<h2>{title}</h2>{text}{curves}"


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
    return f"{table}<p>{escape(note)}</p>{_intervals(facts)}{_finite_sample(facts)}{_card(facts)}"


def _conditions(gate: dict[str, Any]) -> str:
    """What became of each condition of the gate; nothing for a gate of version 0.1.0."""
    rows = [
        [escape(str(each[name])) for name in ("condition", "verdict")] for each in gate.get("conditions", ())
    ]
    previous = gate.get("previous")
    note = f"<p>Compared with the last accepted student, {escape(str(previous))}.</p>" if previous else ""
    return (_table(["condition", "verdict"], rows) if rows else "") + note


def _intervals(facts: dict[str, Any]) -> str:
    """A plot of each metric that has intervals."""
    titles = {each.name: each.title for each in (*sampled_image_sets(facts), REAL_IMAGES)}
    plots = [_plot_intervals(scores, titles) for scores in read_scores(facts) if scores.intervals]
    return _grid(_figure(plot, "", kind="plot") for plot in plots)


def _finite_sample(facts: dict[str, Any]) -> str:
    """FID at half the number of images, at all of them, and without the bias of finite sets."""
    found = {each.name: each for each in read_scores(facts)}.get("fid")
    if not found or not found.details:
        return ""
    count = int(facts["images"])
    rows = [
        [
            escape(name),
            *(found.format.format(value) for value in (each["half"], found.values[name], each["infinity"])),
        ]
        for name, each in found.details.items()
    ]
    return _table(["FID", f"{count // 2} images", f"{count} images", "infinitely many"], rows)


def _card(facts: dict[str, Any]) -> str:
    if "card" not in facts:
        return ""
    text = escape(json.dumps(facts["card"], indent=1))
    return f"<details><summary>Card: all that decides these scores</summary><pre>{text}</pre></details>"


def _pictures(evaluation: Manifest, folder: Path) -> str:
    captions = {
        each.name: f"{each.title.capitalize()}, {each.calls} network call{'s' if each.calls > 1 else ''}"
        for each in sampled_image_sets(evaluation.facts)
    }
    captions[REAL] = "Held-out real images"
    columns = _classes_of_columns(evaluation.facts)
    return _grid(
        _picture((folder / f"{name}.png").read_bytes(), caption + columns)
        for name, caption in captions.items()
    )


def _classes_of_columns(facts: dict[str, Any]) -> str:
    """Which classes the columns of the grids show; nothing for texts."""
    prompts = facts.get("grid_prompts", [])
    classes = [prompt for prompt in dict.fromkeys(prompts) if isinstance(prompt, int)]
    return f"; columns: classes {classes[0]} to {classes[-1]}" if classes else ""


def _pictures_by_prompt(evaluation: Manifest, folder: Path) -> str:
    """The student's picture of each text beside the teacher's."""
    texts = [p for p in evaluation.facts.get("grid_prompts", []) if isinstance(p, str)]
    if not texts:
        return ""
    student, teacher = (_cells(folder / f"{name}.png", len(texts)) for name in ("student", "teacher"))
    shown = list(zip(student, teacher, texts, strict=True))[:SHOWN_TEXTS]
    figures = [_cell_figure([s, t], text) for s, t, text in shown]
    return f"<h2>Student and teacher by prompt</h2><p>Student left, teacher right.</p>{_cell_grid(figures)}"


def _nearest(evaluation: Manifest, folder: Path) -> str:
    """How many samples are near to training images, and the nearest ones."""
    if not (about := evaluation.facts.get("memorisation")):
        return ""
    titles = {each.name: each.title for each in sampled_image_sets(evaluation.facts)}
    shares = ", ".join(f"{titles.get(name, name)} {share:.1%}" for name, share in about["shares"].items())
    note = (
        f"Share of images that are nearer to a training image than {1 - about['quantile']:.0%} of the held-out images are, by the distance "
        f"of features to {about['training_images']} training images: {shares}. About {about['quantile']:.0%} is what new images have; more "
        "is a sign of memorisation. Below, the student's images that are nearest, above their nearest training images."
    )
    pairs = about["nearest"]
    cells = _cells(folder / "galleries" / "nearest.png", 2 * len(pairs), rows=2)
    figures = [
        _cell_figure(
            [cells[i], cells[i + len(pairs)]], f"distance {p['distance']:.3g}: {_prompt(p)}", below=True
        )
        for i, p in enumerate(pairs)
    ]
    return f"<h2>Nearest training images</h2><p>{escape(note)}</p>{_cell_grid(figures)}"


def _lowest_clip(evaluation: Manifest, folder: Path) -> str:
    """The student's images that fit their prompts least."""
    if not (found := evaluation.facts.get("lowest_clip")):
        return ""
    cells = _cells(folder / "galleries" / "lowest_clip.png", len(found), rows=1)
    figures = [
        _cell_figure([c], f"{each['score']:.3f}: {_prompt(each)}")
        for c, each in zip(cells, found, strict=True)
    ]
    return f"<h2>Lowest CLIP scores of the student</h2>{_cell_grid(figures)}"


def _prompt(of: dict[str, Any]) -> str:
    prompt = of["prompt"]
    return f"class {prompt}" if isinstance(prompt, int) else str(prompt)


def _cells(path: Path, count: int, rows: int = 0) -> list[Image]:
    """The images of a picture grid, row by row; without `rows`, the grid has cells of as many pixels in height as in width."""
    from PIL import Image

    picture = Image.open(path).convert("RGB")
    width, height = picture.size
    rows = rows or max(1, round((count * height / width) ** 0.5))
    columns = -(-count // rows)
    across, down = (width - BORDER) // columns, (height - BORDER) // rows
    places = [divmod(index, columns) for index in range(count)]
    return [
        picture.crop((c * across + BORDER, r * down + BORDER, (c + 1) * across, (r + 1) * down))
        for r, c in places
    ]


def _cell_figure(cells: list[Image], caption: str, below: bool = False) -> str:
    """Images beside or below each other, with a caption, as a JPEG of at most `CELL` pixels each."""
    from PIL import Image

    for cell in cells:
        cell.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    width, height = cells[0].size
    sheet = Image.new("RGB", (width, height * len(cells)) if below else (width * len(cells), height))
    for index, cell in enumerate(cells):
        sheet.paste(cell, (0, index * height) if below else (index * width, 0))
    stream = io.BytesIO()
    sheet.save(stream, "JPEG", quality=QUALITY)
    kind = "pixels" if width < SMALL_CELL else "photo"
    return _figure(stream.getvalue(), caption, kind, form="jpeg")


def _cell_grid(figures: list[str]) -> str:
    """Small figures in four columns, or two on a phone."""
    return f'<div class="cells">{"".join(figures)}</div>'


def _curves(run: Path) -> str:
    metrics = read_metrics(run)
    figures = [
        _plot(panel, {name: _series(metrics, name) for name in names})
        for panel, names in panel_metrics(metrics).items()
    ]
    return _grid(_figure(png, "", kind="plot") for png in figures)


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
    return _grid(_picture(p.read_bytes(), f"Student after step {int(p.stem)}") for p in selected)


def _package(package: Manifest) -> str:
    """What users get, by size."""
    files = sorted(package.files, key=lambda file: -file.size)
    rows = [[f"<code>{escape(file.path)}</code>", f"{file.size / 1e6:,.1f}"] for file in files]
    total = ["all files", f"{sum(file.size for file in files) / 1e6:,.1f}"]
    note = "Which program reads which file is in the model card, README.md."
    return f"<h2>Package</h2><p>{note}</p>{_table(['file', 'MB'], [*rows, total])}"


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

    lines = row("th", head) + "".join(row("td", cells) for cells in rows)
    return f'<div class="wide"><table>{lines}</table></div>'


def _grid(figures: Iterable[str]) -> str:
    """Figures in two columns, or one on a small screen."""
    inside = "".join(figures)
    return f'<div class="grid">{inside}</div>' if inside else ""


def _picture(png: bytes, caption: str) -> str:
    """A picture grid: a large one as a JPEG of at most `THUMBNAIL` pixels, a small one with its pixels enlarged."""
    if len(png) < LARGEST_PNG:
        return _figure(png, caption, kind="pixels")
    from PIL import Image

    stream = io.BytesIO()
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    picture.save(stream, "JPEG", quality=QUALITY)
    return _figure(stream.getvalue(), caption, kind="photo", form="jpeg")


def _figure(data: bytes, caption: str, kind: str, form: str = "png") -> str:
    encoded = base64.b64encode(data).decode()
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    image = f'<img alt="{escape(caption)}" src="data:image/{form};base64,{encoded}">'
    return f"<figure class={kind}>{image}{text}</figure>"


def _plot(panel: Panel, series: dict[str, tuple[list[float], list[float]]]) -> bytes:
    """A PNG of {name: (steps, values)}."""
    figure, axes = _axes(panel.title)
    for name, (steps, values) in series.items():
        axes.plot(steps, values, label=name, linewidth=1.2)
    axes.set_xlabel("step", fontsize=9)
    if panel.log_scale:
        axes.set_yscale("log")
    if len(series) > 1:
        axes.legend(fontsize=8)
    return _png(figure)


def _plot_intervals(scores: MetricScores, titles: dict[str, str]) -> bytes:
    """A PNG of the score of each set with its interval; the best is above."""
    sets = [name for name in titles if name in scores.intervals]
    sets.sort(key=lambda name: scores.values[name], reverse=scores.better == "smaller")
    figure, axes = _axes(f"{scores.title} with its interval of 95 % ({scores.direction})".replace("$", r"\$"))
    for place, name in enumerate(sets):
        low, high = scores.intervals[name]
        axes.plot([low, high], [place, place], linewidth=2.4, color="#4477aa", solid_capstyle="butt")
        axes.plot([scores.values[name]], [place], marker="o", markersize=5, color="#223355")
    axes.set_yticks(range(len(sets)), [titles[name] for name in sets])
    axes.set_ylim(-0.6, len(sets) - 0.4)
    return _png(figure)


def _axes(title: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(4.8, 2.7), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    return figure, axes


def _png(figure: Figure) -> bytes:
    """With few colours, which makes the file a third as large."""
    from PIL import Image

    drawn, stream = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(64).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _series(metrics: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of a metric, from the lines that have it."""
    lines = [line for line in metrics if name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]
