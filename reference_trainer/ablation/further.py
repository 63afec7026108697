"""The tables behind the first: distances to the reconstructions above their floor, latents, bounds, all suites."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from reference_trainer.ablation.comparison import (
    ONE,
    RECONSTRUCTIONS,
    TWO,
    Ratio,
    Result,
    as_markdown,
    by_seed,
    distinct,
    paired_ratio,
    spread_of,
)
from reference_trainer.evaluation.features import PooledLatents
from reference_trainer.evaluation.rows import in_digits
from reference_trainer.evaluation.sets import CEILING, FITTED, GAUSSIAN, HALVES

KERNEL = "kernel_rec_x1000"
LATENT_COLUMNS = (
    ("kernel_x1000", "kernel x1000", 2),
    ("whitened_frechet", "whitened Frechet", 1),
    ("precision", "precision", 2),
    ("recall", "recall", 2),
    ("variance_first_4", "var 1-4", 2),
    ("variance_next_12", "var 5-16", 2),
    ("variance_rest", "var 17-", 2),
)
"""Key of a row of latents, heading, digits."""


def as_tables(results: Sequence[Result], baseline: str, stopped: Sequence[tuple[str, str]] = ()) -> str:
    """All tables: of all suites together, then a suite after the other; arguments as ``as_markdown``."""
    lines = all_suites(results, baseline)
    for suite in distinct([r.suite for r in results]):
        own = [r for r in results if r.suite == suite]
        lines += [
            as_markdown(own, baseline, stopped),
            *about_autoencoder(own),
            *about_network(own),
            *to_reconstructions(own, baseline),
            *in_latents(own),
        ]
    return "\n".join(lines)


def bounds_of(results: Sequence[Result]) -> Result | None:
    """The run, of those of a suite, that measured what bounds them all."""
    return next((run for run in results if HALVES in run.rows), None)


def floor_of(results: Sequence[Result]) -> float | None:
    """The Frechet distance to the reconstructions that samples without a flaw would have, as many as were drawn.

    Half of the reconstructions against the other half have one by chance alone. It falls as 1/n with the size n of the
    sets (Chong and Forsyth 2020, arXiv 1911.07023), so that of sets of n it is the halves' times n_half / n.
    None: not measured.
    """
    run = bounds_of(results)
    if run is None or RECONSTRUCTIONS not in run.rows[HALVES] or ONE not in run.rows:
        return None
    return run.rows[HALVES][RECONSTRUCTIONS] * run.rows[HALVES]["n"] / run.rows[ONE]["n"]


def excess(own: Sequence[Result], arm: str, row: str) -> dict[int, float]:
    """Frechet distance to the reconstructions less the floor, a value a seed.

    Args:
        own: results of one suite.
    """
    floor = floor_of(own)
    if floor is None:
        return {}
    values = by_seed(own, own[0].suite, arm, row, RECONSTRUCTIONS)
    return {seed: value - floor for seed, value in values.items()}


def ratio_of(own: Sequence[Result], arm: str, baseline: str, row: str, metric: str) -> Ratio | None:
    """``arm`` over ``baseline`` by ``metric``, ``RECONSTRUCTIONS`` (its excess) or ``KERNEL``, over paired seeds.

    A value below chance counts as chance, a tenth of the floor or the kernel distance of the halves: a seed that was
    lucky would otherwise make any ratio, and one below 0 none.
    """
    run, floor = bounds_of(own), floor_of(own)
    if run is None or floor is None:
        return None
    if metric == RECONSTRUCTIONS:
        chance, pair = 0.1 * floor, [excess(own, name, row) for name in (arm, baseline)]
    else:
        chance = abs(run.rows[HALVES].get(KERNEL, 0.0))
        pair = [by_seed(own, run.suite, name, row, KERNEL) for name in (arm, baseline)]
    values, reference = ({seed: max(value, chance) for seed, value in found.items()} for found in pair)
    return paired_ratio(values, reference)


def to_reconstructions(own: Sequence[Result], baseline: str) -> list[str]:
    """What ranks the arms of a suite: excess and kernel distance, 1 and 2 evaluations, with ratios; bounds as rows."""
    floor, run = floor_of(own), bounds_of(own)
    if floor is None or run is None:
        return []
    head = ["arm"]
    for evaluations in (ONE, TWO):
        head += [f"FD rec - floor, {evaluations}", "ratio", f"kernel rec x1000, {evaluations}", "ratio"]
    lines = [
        f"To the reconstructions; floor {in_digits(floor)} for {run.rows[ONE]['n']} samples (half of the "
        f"reconstructions against the other half {in_digits(run.rows[HALVES][RECONSTRUCTIONS])}, its bias falls as "
        "1/n). Ratios: what lies below chance counts as chance, a tenth of the floor or the halves' kernel distance.",
        "",
        *_head(head),
    ]
    for arm in distinct([r.arm for r in own]):
        cells = [arm]
        for evaluations in (ONE, TWO):
            for metric, values in (
                (RECONSTRUCTIONS, excess(own, arm, evaluations)),
                (KERNEL, by_seed(own, run.suite, arm, evaluations, KERNEL)),
            ):
                ratio = None if arm == baseline else ratio_of(own, arm, baseline, evaluations, metric)
                cells += [spread_of(values, 2), str(ratio or "-")]
        lines.append(_row(cells))
    for name in (GAUSSIAN, CEILING):
        if RECONSTRUCTIONS in (row := run.rows.get(name, {})):
            lines.append(_row([name, in_digits(row[RECONSTRUCTIONS] - floor), "", f"{row[KERNEL]:.2f}", *[""] * 5]))
    return [*lines, "", *_no_better_than_a_gaussian(own, run)]


def in_latents(results: Sequence[Result]) -> list[str]:
    """The latents of the samples of a suite against those of the data, and the bounds as rows."""
    own = [r for r in results if r.latents.get("rows")]
    if not own:
        return []
    about = own[0].latents
    lines = [
        f"In the latents, d = {about['dimensions']}; var: variance of samples over that of the data in principal "
        "components 1-4, 5-16, 17-.",
        "",
        *_head(["arm", "evaluations", *(heading for _, heading, _ in LATENT_COLUMNS)]),
    ]
    for arm in distinct([r.arm for r in own]):
        for evaluations in (ONE, TWO):
            rows = {r.seed: r.latents["rows"].get(evaluations, {}) for r in own if r.arm == arm}
            lines.append(_row([arm, evaluations[0], *_means(list(rows.values()))]))
    run = bounds_of(own)
    for name in (GAUSSIAN, HALVES):
        if run is not None and name in run.latents["rows"]:
            lines.append(_row([name, "", *_means([run.latents["rows"][name]])]))
    return [*lines, ""]


def about_autoencoder(results: Sequence[Result]) -> list[str]:
    """Its PSNR and the size of its latents, in a line, of the results of one suite."""
    run = bounds_of(results)
    if run is None:
        return []
    said = [f"d = {run.latents['dimensions']}"] if run.latents else []
    if psnr := run.rows.get(FITTED, {}).get("psnr"):
        said.append(f"PSNR {psnr:.1f} dB on the training images")
    if held_out := psnr_held_out(run):
        said.append(f"{held_out:.1f} dB held out")
    return [f"Autoencoder: {', '.join(said)}.", ""] if said else []


def about_network(results: Sequence[Result]) -> list[str]:
    """Whether the network is large enough for the budget, in a line: a denoiser of it beats the linear one, or not.

    Asked where a linear denoiser explains half to 99 % of the data: with more noise no sample can be near the data it
    is made of, with less all errors are next to nothing.
    """
    run = bounds_of(results)
    rows = [row for row in run.learned.get("levels", []) if 0.5 <= row["explained"] <= 0.99] if run else []
    if run is None or not rows:
        return []
    least = min(rows, key=lambda row: row["error"])
    lowest = f"{least['error']:.2f} times the best linear denoiser's at noise {least['sigma']:.2g}"
    if least["error"] < 1:
        verdict = "it has learned what no linear function has"
    else:
        verdict = (
            "what is linear is not learned anywhere yet, and the arms below differ by that: take a larger network, "
            "smaller patches, or more steps"
        )
    return [f"Network: the error of {run.arm}, seed {run.seed}, is {lowest}, at its best: {verdict}.", ""]


def psnr_held_out(run: Result) -> float | None:
    """Of the autoencoder, where it was fitted here; dB."""
    return run.autoencoder.get("psnr_held_out")


def all_suites(results: Sequence[Result], baseline: str) -> list[str]:
    """A line a suite: what bounds it, and each arm's ratios to the baseline, excess and kernel, at 1 evaluation.

    None for a single suite.
    """
    suites = [s for s in distinct([r.suite for r in results]) if floor_of([r for r in results if r.suite == s])]
    arms = [arm for arm in distinct([r.arm for r in results]) if arm != baseline]
    if len(suites) < 2 or not arms:
        return []
    lines = [
        "### All suites",
        "",
        "At 1 evaluation, to the reconstructions: Frechet distance less the floor, and kernel distance x1000; of the "
        "arms their ratios to the baseline.",
        "",
        *_head(
            ["suite", "d", "PSNR", "floor", "Gaussian", f"{baseline}: FD", "kernel"]
            + [f"{arm}: {measure}" for arm in arms for measure in ("FD", "kernel")]
        ),
    ]
    for suite in suites:
        own = [r for r in results if r.suite == suite]
        run, floor = bounds_of(own), floor_of(own)
        assert run is not None
        assert floor is not None
        base, base_kernel = excess(own, baseline, ONE), by_seed(own, suite, baseline, ONE, KERNEL)
        gaussian = run.rows.get(GAUSSIAN, {}).get(RECONSTRUCTIONS)
        cells = [
            suite,
            str(run.latents.get("dimensions", "-")),
            f"{run.rows[FITTED]['psnr']:.1f}" if "psnr" in run.rows.get(FITTED, {}) else "-",
            in_digits(floor),
            "-" if gaussian is None else in_digits(gaussian - floor),
            spread_of(base, 2, each=False),
            spread_of(base_kernel, 2, each=False),
        ]
        for arm in arms:
            cells += [str(ratio_of(own, arm, baseline, ONE, metric) or "-") for metric in (RECONSTRUCTIONS, KERNEL)]
        lines.append(_row(cells))
    return [*lines, ""]


def _no_better_than_a_gaussian(own: Sequence[Result], run: Result) -> list[str]:
    """An arm that is not has learned no structure that the covariance does not have."""
    limit = run.rows.get(GAUSSIAN, {}).get(RECONSTRUCTIONS)
    if limit is None:
        return []
    means = {arm: by_seed(own, run.suite, arm, ONE, RECONSTRUCTIONS).values() for arm in distinct([r.arm for r in own])}
    worse = [arm for arm, values in means.items() if values and statistics.fmean(values) >= limit]
    lines = [f"No better than the Gaussian at 1 evaluation: {', '.join(worse)}.", ""] if worse else []
    if ((run.manifest or {}).get("features") or {}).get("name") == PooledLatents.name:
        lines += [
            "These features are the autoencoder's latents, pooled: in them a Gaussian with the latents' covariance is "
            "nearly without a flaw. Judge by others, --features wavelets for one.",
            "",
        ]
    return lines


def _means(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = []
    for key, _, digits in LATENT_COLUMNS:
        values = [row[key] for row in rows if key in row]
        cells.append(f"{statistics.fmean(values):.{digits}f}" if values else "-")
    return cells


def _head(columns: Sequence[str]) -> list[str]:
    return [_row(columns), "|" + "---|" * len(columns)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
