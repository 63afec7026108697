"""`python -m reference_trainer ablate`: arms with paired seeds under one budget, side by side, resumable."""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from reference_trainer.ablation.budget import steps_within
from reference_trainer.ablation.comparison import ONE, Result, by_seed, draw_comparison, judged_by
from reference_trainer.ablation.further import as_tables
from reference_trainer.ablation.joined import joined
from reference_trainer.ablation.ladder import ARMS, BASELINE, SUITES, Arm, Suite, arm_from_words
from reference_trainer.command import did_you_mean
from reference_trainer.config import TrainConfig
from reference_trainer.data.codecs import Foreign
from reference_trainer.data.images import ImageSet
from reference_trainer.data.latents import encode_once
from reference_trainer.data.origin import reopen
from reference_trainer.data.stored import StoredImages
from reference_trainer.errors import Terminated, UserError
from reference_trainer.evaluation.named import features_named
from reference_trainer.files import as_json, write_atomically
from reference_trainer.machine import cache_folder, cores, describe_machine, device_of
from reference_trainer.plotting import save_figure
from reference_trainer.presets import DATA, RECIPES
from reference_trainer.pretrained import FromDiffusers
from reference_trainer.run import RunFolder
from reference_trainer.training.start import new_latents
from reference_trainer.words import Chosen, with_options


@dataclass(frozen=True)
class Job:
    """One run: an arm on a suite with a seed."""

    suite: str
    arm: str
    seed: int
    config: TrainConfig
    run: RunFolder
    brief: bool
    """Measure the samples alone: what bounds them is the same for every arm and seed, and measured by one."""
    features: str | None = None
    """As ``train`` takes it."""

    def finished(self) -> bool:
        """Whether its evaluation is there: that of its last step, by the features asked for."""
        file = self.run.root / "evaluation.json"
        try:
            found = json.loads(file.read_text()) if file.exists() else {}
        except (OSError, ValueError):
            return False
        if not isinstance(found, dict) or found.get("step") != self.config.steps:
            return False
        by = str(found.get("features"))  # "inception (FID; kernel: KID)" of "inception"
        return self.features is None or by == self.features or by.startswith(f"{self.features} (")


def jobs_of(
    arms: Sequence[tuple[Arm, TrainConfig]],
    suites: Sequence[Suite],
    seeds: Sequence[int],
    out: Path,
    features: str | None = None,
) -> list[Job]:
    """All runs, seed by seed, so that every arm has its first seed before any has its second.

    Raises:
        UserError: two arms of one name, which would train in one folder.
    """
    jobs = []
    for seed in dict.fromkeys(seeds):
        for suite in suites:
            for arm, config in arms:
                ready = suite.change(replace(config, seed=seed, save_every=min(1000, config.steps)))
                root = run_root(out, suite.name, arm.name, seed)
                brief = (arm.name, seed) != (arms[0][0].name, seeds[0])
                jobs.append(Job(suite.name, arm.name, seed, ready, RunFolder(root), brief, features))
    for folder, count in Counter(job.run.root for job in jobs).items():
        if count > 1:
            raise UserError(f"{count} arms of one name, kept in {folder.parent}: give one of them, or change a value")
    return jobs


def run_root(out: Path, suite: str, arm: str, seed: int) -> Path:
    """The folder of one run of the ablation in ``out``."""
    return out / suite.replace("%", "pc") / _slug(arm) / f"seed-{seed}"


def _slug(name: str) -> str:
    return "".join(ch if ch.isalnum() else "-" for ch in name.lower()).strip("-").replace("--", "-").replace("--", "-")


def run_jobs(
    jobs: Sequence[Job], out: Path, workers: int, devices: Sequence[str], stop_above: float, about: dict[str, Any]
) -> list[Result]:
    """Run what is not finished, ``workers`` at a time; the report is written anew behind each run.

    Args:
        devices: "cpu", or one name a GPU; workers take them in turn.
        stop_above: see ``stopped_arms``; inf: never.
    Raises:
        KeyboardInterrupt, Terminated: by Ctrl-C, by SIGTERM; after the children saved.
    """
    for job in jobs:
        with job.run.locked():
            job.run.claim(job.config)
    children = Children()
    # The children inside: an error here stops them before the pool waits for what it runs.
    with tqdm(total=len(jobs), desc="runs", unit="run") as bar, ThreadPoolExecutor(workers) as pool, children:
        results: dict[int, Result] = {}

        def work(index: int) -> tuple[int, Result | None]:
            job = jobs[index]
            if children.stopping:
                return index, None
            stopped = stopped_arms([r for r in list(results.values()) if r.suite == job.suite], stop_above)
            if not job.finished() and (job.suite, job.arm) in stopped:
                return index, None
            return index, children.run(job, devices[index % len(devices)])

        for done in as_completed([pool.submit(work, index) for index in range(len(jobs))]):
            index, result = done.result()
            if result is not None:
                results[index] = result
                bar.set_postfix_str(f"{result.arm}, {result.suite}, seed {result.seed}", refresh=False)
                write_comparison([results[i] for i in sorted(results)], out, stop_above, about)
            bar.update()
    if children.stopping:
        raise Terminated if children.number == signal.SIGTERM else KeyboardInterrupt
    return [results[i] for i in sorted(results)]


def stopped_arms(results: Sequence[Result], above: float) -> list[tuple[str, str]]:
    """The rule: an arm's further seeds are skipped once its first finished seed is ``above`` times the baseline's.

    By ``judged_by``, on the same seed and suite. Returns (suite, arm).
    """
    out = []
    for suite, arm in dict.fromkeys((r.suite, r.arm) for r in results):
        metric = judged_by(results, suite)
        values, baseline = (by_seed(results, suite, name, ONE, metric) for name in (arm, BASELINE))
        common = sorted(values.keys() & baseline.keys())
        if common and values[common[0]] > above * baseline[common[0]]:
            out.append((suite, arm))
    return out


class Children:
    """The training processes; inside the block Ctrl-C and SIGTERM ask each of them to save and stop."""

    def __init__(self) -> None:
        self.stopping, self.number = False, signal.SIGINT
        self._running: set[subprocess.Popen[str]] = set()

    def __enter__(self) -> Children:
        self._previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        if threading.current_thread() is threading.main_thread():
            for number in self._previous:
                signal.signal(number, self._stop)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # such as a full disk: the runs save, those that wait do not begin
            self._stop_all(signal.SIGINT)
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _stop(self, number: int, _: object) -> None:
        tqdm.write("stopping: the runs are saved; the same command goes on with them")
        self._stop_all(number)

    def _stop_all(self, number: int) -> None:
        self.stopping, self.number = True, signal.Signals(number)
        for child in list(self._running):
            child.send_signal(number)

    def run(self, job: Job, device: str) -> Result | None:
        """Train and evaluate in a process of its own, or read what is there. None: stopped."""
        failure = ""
        if not job.finished():
            command = [
                sys.executable,
                "-m",
                "reference_trainer",
                "train",
                f"--out={job.run.root}",
                f"--device={device}",
                *(["--brief"] if job.brief else []),
                *([f"--features={job.features}"] if job.features else []),
            ]
            with (job.run.root / "log.txt").open("w") as log:
                # A session of its own: the terminal's Ctrl-C reaches this process, which passes it on once.
                child = subprocess.Popen(
                    command,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    stdout=log,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                )
                self._running.add(child)
            if self.stopping:  # since it was looked at: whoever stopped all has not seen this one
                child.send_signal(self.number)
            child.wait()
            self._running.discard(child)
            if child.returncode and self.stopping:
                return None
            if child.returncode:
                lines = (job.run.root / "log.txt").read_text(errors="replace").strip().splitlines()
                failure = lines[-1].removeprefix("error: ")[:200] if lines else f"status {child.returncode}"
        evaluation = {} if failure else json.loads((job.run.root / "evaluation.json").read_text())
        return Result(
            suite=job.suite,
            arm=job.arm,
            seed=job.seed,
            steps=job.config.steps,
            seconds=training_seconds(job.run),
            rows=evaluation.get("rows", {}),
            failure=failure,
            manifest=evaluation.get("manifest"),
            latents=evaluation.get("latents", {}),
            autoencoder=evaluation.get("autoencoder", {}),
            learned=evaluation.get("learned", {}),
        )


def training_seconds(run: RunFolder) -> float:
    """Wall time of training, over all its sittings."""
    total = before = 0.0
    for row in run.metrics():
        total += row["seconds"] - (before if row["seconds"] >= before else 0.0)  # the clock restarts with each sitting
        before = row["seconds"]
    return total


def write_comparison(results: Sequence[Result], out: Path, stop_above: float, about: dict[str, Any]) -> None:
    """ablation.md, ablation.json and ablation.png in ``out``."""
    stopped = stopped_arms(results, stop_above)
    steps, machine = sorted({r.steps for r in results}), about["machine"]
    lines = [
        f"`{about['command']}`",
        "",
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}; {about['date']}; "
        f"{'steps ' + ', '.join(map(str, steps))}; paired seeds "
        f"{sorted({r.seed for r in results})}. FD: Frechet distance to the clean training images, FD rec: to their "
        "reconstructions, encoded and decoded, without outliers or clip; lower is better; mean (each seed). Ratio: "
        "geometric mean over paired seeds (95 % t interval). Arms are ranked by FD rec: FD is mostly what a lossy "
        "autoencoder loses, the same for all arms, which hides what training did.",
        "",
    ]
    if stop_above < float("inf"):
        lines += [
            f"Rule: an arm whose first seed is above {stop_above:g} times the baseline's gets no further seed.",
            "",
        ]
    text = "\n".join(lines) + as_tables(results, BASELINE, stopped)
    write_atomically(out / "ablation.md", text.encode())
    report = about | {"stopped": stopped, "runs": [asdict(r) for r in results]}
    write_atomically(out / "ablation.json", (as_json(report, indent=1) + "\n").encode())
    save_figure(draw_comparison(results, BASELINE), out / "ablation.png")


def fit_autoencoders(jobs: Sequence[Job], cache: Path, device: torch.device) -> None:
    """Fit and encode, once and before the workers start, what they would each do at the same time.

    Raises:
        UserError: a run that is there, finished or not, was made from other images or another autoencoder.
    """
    loaded: dict[Any, ImageSet] = {}
    fitted = set()
    for job in jobs:
        data, key = job.config.data, (job.config.data, job.config.autoencoder)
        images = loaded[data] = loaded.get(data) or job.config.load_images(device)
        if job.run.space_file.exists():
            reopen(job.run.space_file, job.run.config().autoencoder, images, device)
        elif not job.finished() and key not in fitted and not isinstance(images, StoredImages):
            fitted.add(key)
            codec = job.config.autoencoder.fit(images, device, cache)
            if isinstance(codec, Foreign):  # of no other are latents kept
                encode_once(codec, images, device, cache)


def run_ablate(options: argparse.Namespace) -> int:
    """Compare the arms."""
    if options.list:
        print("arms:", *(f"  {arm.name}" for arm in ARMS), "suites:", *(f"  {s.name}" for s in SUITES), sep="\n")
        return 0
    if options.join:
        print(as_tables(joined(options.join), BASELINE))
        return 0
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("ablate starts a process for each GPU or core itself (--workers): leave torchrun out")
    if not options.stop_above > 1:
        raise UserError(f"--stop-above must be larger than 1, got {options.stop_above}")
    for name, value in (("--steps", options.steps), ("--seconds", options.seconds), ("--workers", options.workers)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name} must be positive, got {value}")
    for word in (*options.words, *(word for words in options.arm for word in words)):
        if word.partition("=")[0] in ("steps", "seed"):
            raise UserError(f"{word}: every arm gets the same steps and seeds; give them with --steps and --seeds")
    device = device_of(options.device)
    if options.features:  # a name that cannot be loaded would stop every run behind its training
        features_named(options.features, device)
    devices = devices_of(device)
    named = picked([] if options.arm and options.arms is None else options.arms, ARMS)
    chosen = [arm for arm in ARMS if arm.name == BASELINE or arm.name in named]
    chosen += [arm_from_words(words, options.data) for words in options.arm]
    suites = [suite for suite in SUITES if suite.name in picked(options.suites, SUITES)]
    if options.seconds and (sized := [suite.name for suite in suites if suite.sized]):
        raise UserError(f"--seconds measures one size of latents, suite {sized[0]} has another: give --steps")
    base, changes = base_of(options.words, options.data)
    noted = functools.cache(FromDiffusers.found)  # one network for all arms: loaded and hashed once
    arms = [(arm, with_options(arm.build(base), changes).found(noted)) for arm in chosen]
    about = {"command": command_line(), "machine": describe_machine(), "date": datetime.date.today().isoformat()}
    if options.seconds:
        latents_of = [(arm.name, (config.data, config.autoencoder)) for arm, config in arms]
        if others := [name for name, those in latents_of if those != latents_of[0][1]]:
            raise UserError(f"--seconds measures one size of latents, arm {others[0]} may have another: give --steps")
        images = arms[0][1].load_images(device)
        latents, _ = new_latents(arms[0][1], images, cache_folder(), device)
        named_configs = [(arm.name, config) for arm, config in arms]
        timing = options.out / "timing.json"
        steps = steps_within(options.seconds, named_configs, latents, images.train_labels, timing, device)
        arms = [(arm, replace(config, steps=steps[arm.name])) for arm, config in arms]
    else:
        arms = [(arm, replace(config, steps=options.steps)) for arm, config in arms]
    jobs = jobs_of(arms, suites, options.seeds, options.out, options.features)
    fit_autoencoders(jobs, cache_folder(), device)
    workers = options.workers or (len(devices) if device.type == "cuda" else cores())
    run_jobs(jobs, options.out, workers, devices, options.stop_above, about)
    print((options.out / "ablation.md").read_text())
    print(f"look at {options.out / 'ablation.png'}")
    return 0


def devices_of(device: torch.device) -> list[str]:
    """What runs are shared out to: all GPUs where none of them was named."""
    if device.type != "cuda" or device.index is not None:
        return [str(device)]
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def base_of(words: Sequence[str], data: Path | None) -> tuple[TrainConfig, list[str]]:
    """What every arm is built on: the preset of data among ``words``, on what ``--data`` names; and the other words.

    Raises:
        UserError: a recipe among them, two presets of data, or one without its store.
    """
    if recipes := [word for word in words if word in [recipe.__name__ for recipe in RECIPES]]:
        raise UserError(f"{recipes[0]} is a recipe, as the arms are: give --arm {recipes[0]}")
    named = [word for word in words if word in [preset.__name__ for preset in DATA]]
    chosen = Chosen.of(named)
    base = chosen.configured(path=data)
    chosen.require_data(base)
    return base, [word for word in words if word not in named]


def picked(names: Sequence[str] | None, there: Sequence[Arm | Suite]) -> set[str]:
    """``names``, checked, or all."""
    known = [part.name for part in there]
    if unknown := sorted(set(names or ()) - set(known)):
        raise UserError(f"unknown {unknown[0]}{did_you_mean(unknown[0], known)}: there are {'; '.join(known)}")
    return set(known if names is None else names)


def command_line() -> str:
    """What was typed."""
    return "python -m reference_trainer " + shlex.join(sys.argv[1:])
