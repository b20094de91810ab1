"""The figures of ``hift-ds estimate`` for a reader."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

SWITCH_NAMES = {
    "slice_numel": "update in slices",
    "checkpointing": "recomputed blocks",
    "chunked_loss": "loss in chunks",
    "offload": "activations offloaded to the host",
    "everything": "all of these together",
}


def print_estimate(figures: dict[str, Any]) -> None:
    """Print what :func:`hift_ds.cli.estimate.estimate` gives, as tables for a terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    gpus = f", {figures['gpus']} GPUs" if figures["gpus"] > 1 else ""
    console.print(
        f"{figures['model']}: {figures['numel'] / 1e9:.2f} B parameters in {figures['num_groups']} groups, "
        f"{figures['batch']} x {figures['length']} tokens on one GPU{gpus}",
        markup=False,
    )
    for line in figures.get("chosen", {}).get("lines", ()):
        console.print(line, markup=False)
    worst = figures["worst_group"]
    group = f"group {worst['index']} ({worst['name']})"
    console.print(f"\nPeak on the GPU: {figures['peak_gib']:.2f} GiB, while {group} trains.", markup=False)
    for table in (_phases(figures), _elsewhere(figures), _switches(figures), _cards(figures)):
        console.print(table)
    if "probe" in figures:
        console.print(_probe(figures["probe"]))
    console.print(f"How: {figures['method']}.", markup=False)
    for assumption in figures["assumptions"]:
        console.print(f"Assumed: {assumption}.", markup=False)


def _table(title: str, *columns: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _phases(figures: dict[str, Any]) -> Table:
    table = _table("Peak by phase, and what it holds", "phase", "GiB", "memory", "GiB")
    phases, categories = list(figures["phases"].items()), list(figures["categories"].items())
    for row in range(max(len(phases), len(categories))):
        cells = [[name, f"{value:.2f}"] if row < len(part) else ["", ""]
                 for part in (phases, categories) for name, value in part[row : row + 1] or [("", 0)]]  # fmt: skip
        table.add_row(*(cell for pair in cells for cell in pair))
    return table


def _elsewhere(figures: dict[str, Any]) -> Table:
    table = _table("Host memory, disk and computing", "what", "amount")
    table.add_row("host memory of the node", f"{figures['host_gib']:.1f} GiB")
    table.add_row("  of it page-locked", f"{figures['pinned_gib']:.1f} GiB")
    table.add_row("optimizer states on disk", f"{figures['disk_gib']:.1f} GiB")
    table.add_row("a checkpoint", f"{figures['checkpoint_gib']:.1f} GiB")
    table.add_row("optimizer states copied in, and out, in a step", f"{figures['state_gib_per_step']:.2f} GiB")
    table.add_row("TFLOP in a micro-batch", f"{figures['flops_per_step'] / 1e12:.1f}")
    table.add_row("  as a share of full fine-tuning's", f"{figures['flops_ratio_full']:.3f}")
    table.add_row("  as a share of LoRA's (rank 16, all linear layers)", f"{figures['flops_ratio_lora']:.3f}")
    table.add_row("full fine-tuning, all states on the GPU: peak", f"{figures['full_fine_tuning_peak_gib']:.2f} GiB")
    return table


def _switches(figures: dict[str, Any]) -> Table:
    table = _table("What saves memory", "option", "now", "if it were", "peak then, GiB")
    for name, peak in figures["switched"].items():
        if name == "everything":
            table.add_row(SWITCH_NAMES[name], "", "on", f"{peak:.2f}")
        else:
            on = figures["switches"][name]
            table.add_row(SWITCH_NAMES[name], "on" if on else "off", "off" if on else "on", f"{peak:.2f}")
    return table


def _cards(figures: dict[str, Any]) -> Table:
    table = _table(
        "Cards",
        "card",
        "fits",
        f"largest batch at {figures['length']}",
        f"longest rows at {figures['batch']}",
        "would fit with",
    )
    for row in figures["fits"]:
        with_switch = ", ".join(SWITCH_NAMES[name] for name in row["would_fit_with"])
        table.add_row(
            f"{row['card_gib']} GiB", "yes" if row["fits"] else "no", str(row["largest_batch"] or "-"),
            str(row["largest_length"] or "-"), with_switch,
        )  # fmt: skip
    return table


def _probe(probe: dict[str, Any]) -> Table:
    table = _table(f"One real step on {probe['device']}", "", "predicted, GiB", "measured, GiB", "off by")
    off = probe["measured_gib"] / probe["predicted_gib"] - 1
    table.add_row(probe["group"], f"{probe['predicted_gib']:.3f}", f"{probe['measured_gib']:.3f}", f"{off:+.2%}")
    return table
