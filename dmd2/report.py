"""The HTML report of a run: one file, nothing fetched, no script, so that any viewer may show it."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dmd2.io.artifact import Manifest
from dmd2.io.local import write_text
from dmd2.model_card import chosen
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


def write_report(path: Path, manifests: dict[str, Manifest], run: Path, evaluation: Path) -> None:
    config = manifests["run"].config
    assert config is not None
    gate = manifests["gate"].facts
    parts = [
        f"<h1>{escape(config.recipe)}</h1>",
        f'<p class="{gate["decision"]}"><b>{gate["decision"].capitalize()}</b>: {escape(gate["reason"])}.</p>',
        "<h2>Quality</h2>",
        _scores(manifests["evaluation"]),
        _pictures(manifests["evaluation"], evaluation),
        "<h2>Training</h2>",
        f"<p>{escape(text)}</p>" if (text := chosen(manifests["run"])) else "",
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


def _scores(evaluation: Manifest) -> str:
    f = evaluation.facts
    rows = [(told(v), str(v["calls"]), v["fd"]) for v in f["variants"]] + [
        ("real training images", "", f["fid_real"])
    ]
    body = [[escape(name), calls, f"{fid:.2f}", f"{fid / f['fid_teacher']:.2f}"] for name, calls, fid in rows]
    accuracy = (
        f", accuracy {f['features_accuracy']:.1%} on the held-out images" if "features_accuracy" in f else ""
    )
    note = f"{f['images']} images each against {f['images_real']} held-out real ones. Features: {f['features']}{accuracy}. Seed {f['seed']}. Frechet distance and resizing by clean-fid."
    return _table(["", "network calls", "FID", "FID / teacher's"], body) + f"<p>{escape(note)}</p>"


def told(variant: dict[str, Any]) -> str:
    """`teacher in 4 steps`."""
    who, *fewer = variant["name"].split("_")
    steps = variant["steps"]
    return f"{who} in {steps} step{'s' if steps > 1 else ''}" if fewer else who


def _pictures(evaluation: Manifest, folder: Path) -> str:
    f = evaluation.facts
    captions = {v["name"]: f"{told(v).capitalize()}, {v['calls']} network call(s)" for v in f["variants"]}
    captions |= {"real": "Held-out real images"}
    return "".join(
        _figure((folder / f"{name}.png").read_bytes(), caption, pixels=True)
        for name, caption in captions.items()
    )


def _curves(run: Path) -> str:
    metrics = read_metrics(run)
    panels = {
        "Losses of the student": ("student/", ("_gradient", "grad_norm")),
        "Losses of the critic (dmd = denoising)": ("critic/", ("_gradient", "grad_norm")),
    }
    figures = [
        _plot(title, {n: _series(metrics, n) for n in _names(metrics, prefix) if not n.endswith(skip)})
        for title, (prefix, skip) in panels.items()
    ]
    gradients = [n for n in _names(metrics, "") if n.endswith("_gradient")]
    figures.append(
        _plot("Gradient norm at the samples, by term", {n: _series(metrics, n) for n in gradients}, log=True)
    )
    norms = [n for n in _names(metrics, "") if n.endswith("grad_norm")]
    figures.append(
        _plot(
            "Gradient norm of the weights, before clipping", {n: _series(metrics, n) for n in norms}, log=True
        )
    )
    figures.append(_plot("Images per second", {"images_per_s": _series(metrics, "images_per_s")}))
    if any(SCORE in line for line in metrics):
        title = "FID to training samples, at the checkpoints"
        figures.append(_plot(title, {SCORE: _series(metrics, SCORE)}))
    return "".join(_figure(png, "") for png in figures)


def _previews(run: Path) -> str:
    pictures = sorted((run / "previews").glob("*.png"))
    chosen = [p for p in pictures if p in (pictures[0], pictures[len(pictures) // 2], pictures[-1])]
    return "".join(_figure(p.read_bytes(), f"Student after step {int(p.stem)}", pixels=True) for p in chosen)


def _times(manifests: dict[str, Manifest]) -> str:
    rows = []
    for kind, manifest in manifests.items():
        images = manifest.facts.get("images") if kind in ("teacher", "run") else manifest.facts.get("train")
        rate = f"{images / manifest.seconds:.0f}" if images and manifest.seconds else ""
        rows.append([escape(kind), f"{manifest.seconds:.1f}", rate])
    return _table(["folder", "seconds", "images/s"], rows)


def _provenance(manifests: dict[str, Manifest]) -> str:
    rows = [[escape(kind), f"<code>{m.digest}</code>", str(len(m.files))] for kind, m in manifests.items()]
    versions = ", ".join(f"{name} {version}" for name, version in manifests["run"].versions.items())
    return _table(["folder", "sha256 digest", "files"], rows) + f"<p>{escape(versions)}</p>"


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


def _plot(title: str, series: dict[str, tuple[list[float], list[float]]], *, log: bool = False) -> bytes:
    figure, axes = plt.subplots(figsize=(4.8, 2.7), dpi=110, layout="constrained")
    for name, (steps, values) in series.items():
        axes.plot(steps, values, label=name, linewidth=1.2)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if log:
        axes.set_yscale("log")
    if len(series) > 1:
        axes.legend(fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    plt.close(figure)
    return stream.getvalue()


def _names(metrics: list[dict[str, float]], prefix: str) -> list[str]:
    return list(dict.fromkeys(name for line in metrics for name in line if name.startswith(prefix)))


def _series(metrics: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    there = [line for line in metrics if name in line]
    return [line["step"] for line in there], [line[name] for line in there]
