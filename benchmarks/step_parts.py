"""Times the parts of a training step, for the student alone and distilled: ``python benchmarks/step_parts.py``.

YOLOv3 teaches YOLOv3-tiny with the trainer's defaults. The contenders are the student alone, the same distillation in
plain PyTorch without folding the teacher's batch norms, and fastkd. A round has one step of each; the tables give
medians and, for the whole step, quartiles.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch
from bench_training import ALONE, make_objective, random_images
from workloads import random_targets

from fastkd.distiller import takes_output
from fastkd.yolov3.train.objective import Objective

FEWER: dict[str, dict[str, Any]] = {  # options for fewer passes of the teacher
    "every 2nd step": {"teacher_every": 2},
    "every 4th step": {"teacher_every": 4},
    "half of the images": {"teacher_images": 0.5},
}
PROVIDERS = (ALONE, "eager", "fastkd", *FEWER)
SETTINGS = {  # width, side of the images, batch, rounds
    "cpu": [(1.0, 416, 2, 15), (1.0, 416, 8, 7), (0.25, 96, 16, 60)],
    "cuda": [(1.0, 416, 16, 30), (1.0, 416, 64, 15)],
}
PARTS = ("student's forward", "detection loss", "teacher", "prior", "adapters and loss", "backward", "optimizer")


class Clock:
    """Records the milliseconds of functions by name, with one list entry per step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.now: dict[str, float] = defaultdict(float)
        self.steps: list[dict[str, float]] = []

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            began = self._time()
            try:
                return function(*args, **options)
            finally:
                self.now[name] += 1e3 * (self._time() - began)

        return run

    def watch(self, owner: Any, method: str, name: str) -> None:
        setattr(owner, method, self.timed(name, getattr(owner, method)))

    def end_steps(self, count: int) -> None:
        self.steps.append({name: time / count for name, time in self.now.items()})
        self.now.clear()

    def _time(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Step:
    """A training step with timed parts; the mean of ``teacher_every`` steps, in one of which the teacher runs."""

    def __init__(self, provider: str, width: float, side: int, batch: int, device: str) -> None:
        images = random_images(batch, side, device)
        targets, self.clock = random_targets(batch, side, device), Clock(images.device)
        options = FEWER.get(provider, {})
        objective = make_objective("fastkd" if options else provider, images, width, **options)
        self.count = options.get("teacher_every", 1)
        optimizer = torch.optim.SGD(objective.parameters(), lr=1e-4, momentum=0.9)
        self._watch(objective, provider)

        def step() -> None:
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss, _ = objective(images, targets)
            self.clock.timed("backward", loss.backward)()
            self.clock.timed("optimizer", optimizer.step)()
            optimizer.zero_grad()

        self._step = self.clock.timed("step", step)

    def __call__(self) -> None:
        for _ in range(self.count):
            self._step()
        self.clock.end_steps(self.count)

    def _watch(self, objective: Objective, provider: str) -> None:
        self.clock.watch(objective.student, "forward", "student's forward")
        self.clock.watch(objective.detection, "forward", "detection loss")
        distiller = objective.distiller
        if distiller is None:
            return
        self.clock.watch(distiller._teacher, "run", "teacher")
        self.clock.watch(distiller.criterion, "forward", "adapters and loss")
        prior_of = objective.prior_of

        def timed_prior(*args: Any) -> Any:
            prior = prior_of(*args)
            if provider == "eager" and not takes_output(prior):  # plain PyTorch runs the whole teacher
                sizes_alone = prior
                prior = lambda output, sizes: sizes_alone(sizes)  # noqa: E731
            return self.clock.timed("prior", prior)

        objective.prior_of = timed_prior  # type: ignore[method-assign]


def report(width: float, side: int, batch: int, rounds: int, device: str) -> str:
    steps = {provider: Step(provider, width, side, batch, device) for provider in PROVIDERS}
    for i in range(rounds + 4):
        if i == 4:  # the first rounds calibrate, fold batch norms and choose convolution algorithms
            for step in steps.values():
                step.clock.steps.clear()
        for step in steps.values():
            step()
    times = {
        provider: {part: [x.get(part, 0.0) for x in step.clock.steps] for part in (*PARTS, "step")}
        for provider, step in steps.items()
    }
    lines = [
        f"{side} px, width {width:g}, N = {batch}, ms",
        "",
        f"| | {' | '.join(PROVIDERS)} |",
        "|---|" + "---|" * len(PROVIDERS),
    ]
    for part in PARTS:
        cells = (f"{median(x[part]):.1f}" if any(x[part]) else "" for x in times.values())
        lines.append(f"| {part} | {' | '.join(cells)} |")
    whole = (f"{median(x['step']):.0f} ({spread(x['step'])})" for x in times.values())
    alone = [median(s / a for s, a in zip(x["step"], times[ALONE]["step"], strict=True)) for x in times.values()]
    lines.append(f"| step (quartiles) | {' | '.join(whole)} |")
    lines.append(f"| step / student alone, paired | {' | '.join(f'{x:.2f}' for x in alone)} |")
    return "\n".join(lines) + "\n"


def spread(times: list[float]) -> str:
    low, _, high = quantiles(times, n=4)
    return f"{low:.0f} to {high:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="number of rounds, instead of each setting's own")
    parser.add_argument("--device", choices=SETTINGS, default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    for width, side, batch, rounds in SETTINGS[options.device]:
        print(report(width, side, batch, options.rounds or rounds, options.device), flush=True)


if __name__ == "__main__":
    main()
