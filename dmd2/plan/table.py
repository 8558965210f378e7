"""A plan for people to read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from dmd2.plan.hardware import DISK_GB_S, EFFICIENCY, GB, KERNEL_S, LINK_EFFICIENCY, TERA, USABLE
from dmd2.plan.prediction import Plan
from dmd2.plan.reference import REFERENCE_UNIT_S, Reference


def show(made: Plan, console: Console) -> None:
    for title, table in _tables(made):
        console.print(f"[bold]{title}[/bold]", table, sep="\n")
    console.print("\n".join(f"- {line}" for line in unknown(made)), highlight=False)


def _tables(made: Plan) -> Iterator[tuple[str, Table]]:
    config, mesh = made.config, made.mesh
    told = f"{config.recipe} on {mesh.gpus} x {made.gpu_name}, mesh {mesh} (replicas x shards)"
    yield _table(told, ("weights", "millions"), [(n, f"{v / 1e6:,.2f}") for n, v in made.weights.items()])
    updates = 1 if config.distill.regression else config.distill.critic_updates
    work = [(n, _tflop(v), _tflop(v * updates)) for n, v in made.flops.items()]
    total = sum(made.flops.values())
    yield _table(
        f"TFLOP of {config.distill.batch} images",
        ("part", "average step", f"student update ({updates} steps)"),
        [*work, ("all", _tflop(total), _tflop(total * updates))],
    )
    held = [(name, _s(size / GB)) for name, size in made.memory.items()]
    yield _table(
        f"memory of a GPU, weights {'resident' if made.resident else 'sharded'}, {made.rows} images at a time",
        ("part", "GB"),
        [*held, ("peak", _s(made.memory_gb)), ("usable", f"{USABLE * made.gpu.gb:.1f}")],
    )
    if made.traffic:
        sent = [(kind, f"{calls:,.1f}", _s(size / GB)) for kind, (calls, size) in made.traffic.items()]
        yield _table("messages of a GPU, per average step", ("kind", "calls", "GB received"), sent)
    yield _table("prediction", ("", ""), list(_predicted(made)))
    yield _table(
        "other ways",
        ("mesh", "weights", "checkpointing", "GB", "s/step", "fits"),
        [
            (
                str(c.mesh),
                _word(c.resident),
                c.checkpointing,
                f"{c.gb:.1f}",
                _s(c.seconds),
                "yes" if c.fits else "no",
            )
            for c in made.choices
        ],
    )
    if made.reference:
        yield _reference_table(made.reference)


def _predicted(made: Plan) -> Iterator[tuple[str, str]]:
    config = made.config
    yield from ((f"{name}, s", _s(value)) for name, value in made.seconds.items())
    yield "step, s", _s(made.seconds_per_step)
    yield f"{config.distill.steps:,} steps, hours", _s(made.hours)
    yield "GPU-hours", _s(made.gpu_hours)
    if made.price:
        yield f"cost at {made.price:g} per GPU-hour", f"{made.cost:,.0f}"
    yield "largest micro-batch that fits", str(made.largest or "none")
    saves = config.distill.steps // config.distill.save_every
    yield (
        f"checkpoint, every {config.distill.save_every} steps ({saves} of them), GB",
        f"{made.checkpoint / GB:.2f}",
    )
    yield f"checkpoint at {DISK_GB_S:g} GB/s per machine, in the background, s", _s(made.checkpoint_s)


def _reference_table(of: Reference) -> tuple[str, Table]:
    return _table(
        "seconds of a step on 64 x a100-80gb, 2 images each",
        ("", "s"),
        [
            ("reference: computing (rollouts and score in TF32)", _s(of.computing_s)),
            (
                f"reference: {of.unit_calls:,.0f} calls of its {of.units} units a network, {1e3 * REFERENCE_UNIT_S:g} ms each",
                _s(of.overhead_s),
            ),
            ("reference: both", _s(of.seconds)),
            ("reference: published", _s(of.published_s)),
            ("ours, weights resident", _s(of.ours_s)),
        ],
    )


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[str, Table]:
    table = Table(show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return title, table


def _tflop(value: float) -> str:
    return _s(value / TERA)


def _s(value: float) -> str:
    return f"{value:.3g}" if value < 1 else f"{value:,.2f}"


def _word(resident: bool) -> str:
    return "resident" if resident else "sharded"


def unknown(made: Plan) -> list[str]:
    """What this does not know, in sentences."""
    lines = [
        f"Rates are those of the data sheet ({made.gpu.source}). That {EFFICIENCY:.0%} of the computing rate and {LINK_EFFICIENCY:.0%} of "
        "the links is reached is an assumption: nothing here was measured on a GPU.",
        "Counted: weights, FLOPs of matrix products, convolutions and attention. Work limited by memory (norms, activations) is "
        "in the efficiency. Messages follow from the units, without the padding of shards.",
        f"A kernel takes {1e6 * KERNEL_S:g} us of the host, an assumption too. Nothing is assumed to overlap. Waiting for data, text encoders, previews, judging checkpoints, start, congestion of the network and slow "
        "machines are not in the seconds.",
        f"Memory is the sum of what each part has at its fullest. Activations are what PyTorch keeps, without the workspace of convolutions; {1 - USABLE:.0%} of the memory is left for that, the "
        "driver and fragmentation.",
    ]
    if made.config.engine.compile:
        lines.append("What torch.compile saves, in time and memory, is not in it.")
    if made.reference:
        lines.append(
            "The time per unit call of the reference was itself inferred from its published times: that the sum meets one of them "
            "is no proof of the cause."
        )
    if made.config.distill.regression:
        lines.append("The decoder and the distance of images of the warm-up are not counted.")
    return lines
