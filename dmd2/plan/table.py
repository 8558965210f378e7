"""A plan as tables for people to read. What is predicted and not counted is labelled as predicted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from dmd2.plan.hardware import DISK_GB_S, GB, HIGH, LIKELY, LINK_EFFICIENCY, LOW, TERA, USABLE
from dmd2.plan.prediction import Plan
from dmd2.plan.published_scheme import SECONDS_PER_UNIT_CALL, PublishedScheme
from dmd2.plan.step_costs import is_compiled
from dmd2.plan.traffic import update_rates


def show(made: Plan, console: Console) -> None:
    for title, table in _tables(made):
        console.print(f"[bold]{title}[/bold]", table, sep="\n")
    console.print("\n".join(f"- {line}" for line in limitations(made)), highlight=False)


def _tables(made: Plan) -> Iterator[tuple[str, Table]]:
    config, mesh = made.config, made.mesh
    title = f"{config.recipe} on {mesh.gpus} x {made.gpu_name}, mesh {mesh} (replicas x shards)"
    yield _table(title, ("weights", "millions"), [(n, f"{v / 1e6:,.2f}") for n, v in made.weights.items()])
    updates = round(1 / update_rates(config)["student"])
    work = [(n, _tflop(v), _tflop(v * updates)) for n, v in made.flops.items()]
    total = sum(made.flops.values())
    yield _table(
        f"TFLOP for {config.distill.batch} images, counted",
        ("pass", "average step", f"one student update ({updates} steps)"),
        [*work, ("total", _tflop(total), _tflop(total * updates))],
    )
    parts = [(name, _s(size / GB)) for name, size in made.memory.items()]
    yield _table(
        f"memory of a GPU, weights {_word(made.resident)}, micro-batches of {made.rows} images",
        ("part", "GB"),
        [*parts, ("total", _s(made.memory_gb)), ("available", f"{USABLE * made.gpu.gb:.1f}")],
    )
    if made.traffic:
        sent = [(kind, f"{calls:,.1f}", _s(size / GB)) for kind, (calls, size) in made.traffic.items()]
        yield _table("collectives of a GPU, per average step", ("kind", "calls", "GB received"), sent)
    yield _table("predicted", ("", ""), list(_predicted(made)))
    spent = [(name, _s(value / 3600)) for name, value in made.evaluation.items()]
    share = f"{made.evaluation_gpu_hours / made.gpu_hours:.1%} of the distillation"
    yield _table(
        f"evaluation, predicted: {config.evaluate.images:,} images of each set",
        ("part", "GPU-hours"),
        [*spent, (f"total, {share}", _s(made.evaluation_gpu_hours))],
    )
    yield _table(
        "alternatives",
        ("mesh", "weights", "activation checkpointing", "GB", "predicted s/step", "fits"),
        [
            (
                str(c.mesh),
                _word(c.resident),
                c.checkpointing,
                f"{c.gb:.1f}",
                _s(c.seconds),
                "yes" if c.fits else "no",
            )
            for c in made.alternatives
        ],
    )
    if not made.fits and made.alternatives:
        settings = [(" ".join(one.settings), f"{one.gb:.1f}", _s(one.seconds)) for one in made.remedies]
        yield _table(
            f"it does not fit in {USABLE * made.gpu.gb:.1f} GB; these settings make it fit, the fastest first",
            ("settings", "GB", "predicted s/step"),
            settings or [("none: use more or larger GPUs", "", "")],
        )
    if made.published:
        yield _published_table(made.published)


def _predicted(made: Plan) -> Iterator[tuple[str, str]]:
    config = made.config
    yield from ((f"{name}, s", _s(value)) for name, value in made.seconds.items())
    yield "average step, s", _range(made.seconds_per_step, made.range_s)
    yield f"{config.distill.steps:,} steps, hours", _s(made.hours)
    yield "GPU-hours", _range(made.gpu_hours, made.gpu_hours_range)
    if made.price:
        yield f"cost at {made.price:g} per GPU-hour", f"{made.cost:,.0f}"
    yield "largest micro-batch that fits, images", str(made.largest_micro_batch or "none")
    saves = config.distill.steps // config.distill.save_every
    yield (
        f"a checkpoint, every {config.distill.save_every} steps ({saves} in all), GB",
        f"{made.checkpoint / GB:.2f}",
    )
    parts = ", ".join(made.host_memory)
    yield f"memory of a machine beside data loading and libraries, GB: {parts}", _s(made.host_memory_gb)
    yield f"writing a checkpoint at {DISK_GB_S:g} GB/s per node, in the background, s", _s(made.checkpoint_s)


def _published_table(of: PublishedScheme) -> tuple[str, Table]:
    return _table(
        "predicted seconds of an average step on 64 x a100-80gb, 2 images each",
        ("", "s"),
        [
            ("published scheme: computing (rollouts and critic score in TF32)", _s(of.computing_s)),
            (
                f"published scheme: {of.unit_calls:,.0f} calls of the {of.units} FSDP units of a network, {1e3 * SECONDS_PER_UNIT_CALL:g} ms each",
                _s(of.overhead_s),
            ),
            ("published scheme: sum", _s(of.seconds)),
            ("published scheme: measured by its authors", _s(of.published_s)),
            ("this engine, weights resident", _s(of.ours_s)),
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


def _range(likely: float, bounds: tuple[float, float]) -> str:
    return f"{_s(likely)} ({_s(bounds[0])} to {_s(bounds[1])})"


def _word(resident: bool) -> str:
    return "resident" if resident else "sharded"


def limitations(made: Plan) -> list[str]:
    """What the plan assumes and what it leaves out, in sentences."""
    efficiency = made.gpu.efficiency
    compiled = is_compiled(made.config)
    reached = efficiency.reached(compiled)
    lines = [
        f"The rates are those of the data sheet ({made.gpu.source}). It is assumed that {reached:.0%} of the peak FLOP/s "
        f"({efficiency.source}) and {LINK_EFFICIENCY:.0%} of the bandwidth of the links are reached; nothing was measured on a GPU. "
        f"Low and high are {LOW.efficiency:g} and {HIGH.efficiency:g} times that efficiency.",
        "Counted are weights, and the FLOPs of matrix products, convolutions and attention. Memory-bound operators (norms, "
        "activation functions) are covered by the efficiency. Collectives follow from the sharding units, without padding.",
        f"It is assumed that the host needs {1e6 * LIKELY.kernel_s:g} us to launch a kernel ({1e6 * LOW.kernel_s:g} to "
        f"{1e6 * HIGH.kernel_s:g}), and that nothing overlaps. The seconds leave out "
        "waiting for data, text encoders, previews, scoring of checkpoints, the start, congestion of the network and stragglers.",
        "The evaluation is that of a teacher's first student: with --scores, later ones do without the teacher's part. It leaves out the "
        "text encoders and the resizing of images on the host; its decoder is that of Stable Diffusion.",
        "Memory is the sum of the maxima of its parts. Activations are those that PyTorch keeps, without the workspace of "
        f"convolutions; {1 - USABLE:.0%} of the memory is reserved for that, the driver and fragmentation.",
    ]
    if compiled:
        lines.append(
            "Launches and memory that torch.compile saves are not included, nor the time of compiling."
        )
    elif made.config.engine.compile == "auto":
        lines.append(
            f"Units are compiled where the image has a C compiler; {efficiency.compiled:.0%} of the peak is assumed then "
            "(--engine.compile on)."
        )
    if made.config.engine.activation_checkpointing == "selective" and not compiled:
        lines.append(
            "Without compiling, selective checkpointing sends each operator of a unit through Python; that takes the host half as "
            "long again as full checkpointing, which small micro-batches show and the seconds leave out."
        )
    if made.published:
        lines.append(
            "The time per unit call of the published scheme was inferred from its published times, so that the sum agrees with one "
            "of them does not prove the cause."
        )
    if made.config.distill.no_grad_dtype == "tf32":
        lines.append(
            "Calls without gradient are counted at the rate of the other calls, though they run in TF32."
        )
    if made.config.distill.regression:
        lines.append("The VAE decoder and the image distance of the regression are not counted.")
    return lines
