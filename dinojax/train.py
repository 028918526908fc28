"""A run, from an empty directory to a trained backbone; read it top to bottom.

`prepare` makes every check that can be made before work starts; `train` then goes through the
phases. The order in which a state is found: resume this run, else what the phase starts from (the
previous phase, another run, a weights file), else scratch. Called by `launch/run.py`.
"""

import contextlib
import itertools
import json
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import UInt8
from ml_collections import ConfigDict
from safetensors import SafetensorError

from dinojax import backbone as weights
from dinojax import config as configs
from dinojax import sharding, startup, visualize
from dinojax.data import from_config, masking, mixture, photometric, pipeline, sources
from dinojax.data.unreadable import UnreadableList
from dinojax.eval import knn
from dinojax.objectives import microbatch, ssl
from dinojax.training import checkpoint, health, optim, phases, profiling, rundir, writers
from dinojax.training import state as states

TRY_AGAIN = 75  # exit code after a save on SIGTERM (EX_TEMPFAIL)
OWN_STARTS = ("previous", "previous_teacher", "scratch")  # of a phase; all else names weights


class Run(NamedTuple):
    """What a run is made of, all checks passed."""

    config: ConfigDict
    home: rundir.RunDirectory
    mesh: Mesh
    networks: states.NetworkSet
    data: mixture.Mixture
    evaluator: knn.Evaluator | None
    features: Callable[..., Any]  # jitted: (backbone parameters, uint8 images) -> Features
    peak: float | None  # FLOP/s of all devices

    @property
    def workdir(self) -> pathlib.Path:
        """Where this process writes its files."""
        return self.home.local


def prepare(config: ConfigDict, workdir: str | os.PathLike[str]) -> Run:
    """Check everything that can be checked before work starts.

    Raises:
      ValueError: one sentence naming the value, what was expected and the nearest valid choice.
    """
    config = configs.resolve(config)
    configs.validate(config)
    home = rundir.RunDirectory(workdir, jax.process_index())
    home.fetch()
    begun = check_same_run(config, home)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    shards = sharding.batch_shards(mesh)
    for phase in config.phases:
        groups = phase.batch_size // phase.group
        if groups % (shards * config.microbatches):
            raise ValueError(
                f"phase {phase.name!r}: {groups} groups of {phase.group} images do not split over "
                f"{shards} devices x {config.microbatches} micro-batches; nearest: group="
                f"{max(1, phase.batch_size // (shards * config.microbatches))}"
            )
    writers.check_wandb(config.wandb)
    photometric.policy(config.augment, config.data)  # raises on what cannot be
    networks = states.build_networks(config)
    data = from_config.open_data(config)
    for index in range(len(config.phases)):
        phase_batches(config, data, index, mesh)  # raises where sizes do not fit
    evaluator = None
    if config.eval.knn_train:
        base = configs.first_source(config)
        evaluator = knn.Evaluator(
            sources.related(config.eval.knn_train, base),
            sources.related(config.eval.knn_val, base),
            size=config.eval.size,
            k=(config.eval.knn_k,),
            batch=config.eval.batch,
        )
        evaluator.bank.labels(), evaluator.queries.labels()  # raise now where there are none
    if not begun:
        check_starts(config)
    home.check_writable()  # last: a command that is refused leaves nothing behind
    whole = sharding.replicated(mesh)  # every process looks at all features
    features = jax.jit(feature_function(config, networks), out_shardings=whole)
    # Measured here: on several CPU devices it must come before the mesh is set.
    peak = profiling.peak_flops(config.model.dtype)
    return Run(config, home, mesh, networks, data, evaluator, features, peak)


def check_same_run(config: ConfigDict, home: rundir.RunDirectory) -> bool:
    """Whether a run has begun here; a run directory belongs to one config, so refuse another."""
    saved = home.local / "config.json"
    if not saved.exists():
        return False
    known = json.loads(saved.read_text())["flat"]
    changed = configs.continues(known, config)
    if changed:
        raise ValueError(
            f"{home.where} holds a run of another config ({len(changed)} keys differ; "
            f"{'; '.join(changed[:3])}); continue with its own values or give a new --workdir"
        )
    return True


def check_starts(config: ConfigDict) -> None:
    """The weights that phases will start from must be there now, not after days of training."""
    for phase in config.phases:
        given = [] if phase.start in OWN_STARTS else [("start", phase.start)]
        if phase.gram.teacher == "snapshot" and not own_snapshot(phase.gram.source):
            given.append(("gram.source", phase.gram.source))
        for key, source in given:
            try:
                weights.read(source, part="backbone/norm")  # a small part of it
            except (ValueError, checkpoint.CheckpointError) as error:
                raise ValueError(f"phase {phase.name!r}: {key}: {error}") from None


def own_snapshot(source: str) -> bool:
    """Whether a Gram teacher comes from the run itself."""
    return source == "start" or source.startswith("step:")


def train(run: Run) -> int:
    """Go through all phases; returns the exit code (0 done, 75 stopped by SIGTERM after a save)."""
    config, home, mesh = run.config, run.home, run.mesh
    jax.set_mesh(mesh)
    stop, began = StopRequest(), time.perf_counter()
    write_config(run)

    # ---- where this run stands: its newest good checkpoint, if any ------------------------------
    saves = checkpoint.Checkpoints(
        home.checkpoints, config.checkpoint.keep, config.checkpoint.keep_every
    )
    spans = phases.spans(config)
    state, step = restore(run, saves, spans)
    log = writers.MetricsLog(run.workdir, resume_step=step, wandb=config.wandb)
    if step:
        say(f"resumed at step {step:,}")
    say(phases.describe(config))
    if len(run.data.components) > 1:
        say(run.data.describe())

    # ---- phase by phase --------------------------------------------------------------------------
    for span in spans:
        if step >= span.last:
            continue
        if step == span.first:
            state = begin_phase(run, saves, span, state)
            if step == 0:
                evaluate_floor(run, state, log)
        state, step, stopped = train_phase(run, saves, log, span, state, step, stop)
        if stopped:
            saves.close()
            home.upload()
            say(f"stopped at step {step:,} after a save; run the same command to go on")
            return TRY_AGAIN

    # ---- what is left behind ---------------------------------------------------------------------
    saves.close()
    log.close()
    home.upload()
    spent = profiling.energy(time.perf_counter() - began)
    say(f"done: {home.where}/weights/teacher.safetensors")
    if spent:
        say(f"since the last start: {spent}")
    return 0


def train_phase(
    run: Run,
    saves: checkpoint.Checkpoints,
    log: writers.MetricsLog,
    span: phases.Span,
    state: states.State,
    step: int,
    stop: "StopRequest",
) -> tuple[states.State, int, bool]:
    """Train from global `step` to the end of the phase; (state, step, stopped by a signal)."""
    config, phase, mesh = run.config, span.phase, run.mesh
    step_fn = make_step(config, run.networks, phase, mesh)
    batches = open_batches(run, span, step - span.first)
    unreadable = open_unreadable(run.workdir)
    work = work_per_image(config, run.networks, phase)
    timer = profiling.StepTimer(phase.batch_size, run.peak)
    progress = writers.ProgressLine(phase.name, span.last)
    watch = health.NonFinite(config.max_nonfinite)
    collapse = health.CollapseWatch(config.dino_head.prototypes)
    pending: list[tuple[int, dict[str, Any]]] = []
    shapes: set[int] = set()
    saved = step

    def report(now: int) -> None:
        """Write what the device has finished since the last report; one fetch for all of it."""
        fetched = jax.device_get(pending)
        pending.clear()
        for at, metrics in fetched:
            row = {name: float(value) for name, value in metrics.items()}
            if (at + 1) % config.log_every == 0 or at + 1 == span.last:
                log.write(at + 1, phase.name, row)
            watch.observe(at + 1, row)
            warning = collapse.observe(at + 1, row)
            if warning:
                say(warning)
        if fetched:
            speed = timer.lap(now, span.last, work)
            log.write_speed(now, phase.name, speed, batches.shares())
            progress.update(now, row, speed)
            run.home.upload(seldom=True)
        saves.check()

    with jax.transfer_guard("disallow"), batches:
        while step < span.last and not stop.requested():
            with timer.waiting_for_data():
                batch = next(batches)
            triple = int(batch.pop("triple"))
            replaced = batch.pop("replaced")
            scalars = phases.scalars(config, phase, step - span.first)
            inputs = sharding.to_global(batch, mesh), sharding.to_scalars(scalars, mesh)
            if triple not in shapes:
                shapes.add(triple)
                compile_step(step_fn, state, *inputs)
            state, metrics = step_fn(state, *inputs)
            timer.step()
            with writing(unreadable.path):
                new = unreadable.add(replaced)
            if new:
                logging.warning("step %d: %d unreadable images; %s", step, new, unreadable.path)
            # Metrics are fetched one interval late, so the host never waits for the current step.
            if step % config.log_every == 0:
                report(step)
            pending.append((step, metrics))

            if phases.gram_refresh_due(phase, step - span.first):
                state = states.refresh_gram(state)
                logging.info("gram teacher refreshed after step %d", step)
            step += 1

            if due(step, config.eval.every) and step < span.last:
                with jax.transfer_guard("allow"):
                    evaluate(run, state, log, step, phase.name)
            if due(step, config.checkpoint.every) and step < span.last:
                report(step)  # rows up to this step must be on disk before the state is
                save(run, saves, span, state, step)
                saved = step
        report(step)
        assert step_fn._cache_size() <= len(shapes), "a step shape was compiled twice"

    progress.close()
    if step == span.last:  # before the save, so that a kill in between repeats it
        evaluate(run, state, log, step, phase.name)
        write_weights(run, state, step)
    if saved < step:
        save(run, saves, span, state, step)
    saves.wait()
    return state, step, step < span.last


def make_step(
    config: ConfigDict, networks: states.NetworkSet, phase: ConfigDict, mesh: Mesh
) -> Callable[..., tuple[states.State, dict[str, jax.Array]]]:
    """The compiled step of a phase: (state, batch, scalars) -> (state, metrics).

    Gradients, clip per network, AdamW, EMA. An update that is not finite is discarded as a whole.
    """
    shapes = states.abstract(config, networks, phase, mesh)
    rules = optim.parameter_rules(
        shapes["student"], config.optim.layer_decay, config.optim.patch_embed_lr
    )
    applies = networks.applies()
    fns = ssl.make_loss_fn(
        phase,
        ssl.Networks(applies, applies, networks.backbone.apply),
        photometric.policy(config.augment, config.data),
        configs.patch_stride(config),
        phase.losses.koleo_group,
        jnp.dtype(config.model.dtype),
    )
    unit = max(phase.group, phase.losses.koleo_group if phase.losses.koleo else 1)
    betas = pair(config.optim.betas)
    gradients_of = microbatch.value_and_grad(fns, config.microbatches, unit)

    def step(
        state: states.State, batch: dict[str, jax.Array], scalars: dict[str, jax.Array]
    ) -> tuple[states.State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
        frozen = {"teacher": state["teacher"], "gram": state["gram"]}
        metrics, gradients, centers = gradients_of(
            state["student"], frozen, batch, state["centers"], scalars, key
        )
        with jax.named_scope("update"):
            gradients, norms = optim.clip_by_network(gradients, config.optim.clip)
            student, optimizer = optim.update(
                state["student"], gradients, state["optimizer"], scalars, rules, betas
            )
            teacher = states.ema(state["teacher"], student, scalars["momentum"], state["step"])
            new = {
                "student": student,
                "teacher": teacher,
                "optimizer": optimizer,
                "centers": centers,
            }

            finite = jnp.isfinite(metrics["loss"])
            for norm in (*norms.values(), optax.global_norm(student)):
                finite &= jnp.isfinite(norm)
            kept = optim.select(finite, new, {name: state[name] for name in new})
        missed = 1 - finite.astype(jnp.int32)
        skipped = {
            "total": state["skipped"]["total"] + missed,
            "in_a_row": (state["skipped"]["in_a_row"] + 1) * missed,
        }
        metrics |= {f"grad_norm_{name}": norm for name, norm in norms.items()}
        metrics |= {"skipped": skipped["total"], "skipped_in_a_row": skipped["in_a_row"]}
        metrics |= {name: scalars[name] for name in scalars}
        return {**state, **kept, "step": state["step"] + 1, "skipped": skipped}, metrics

    # The state keeps its place: without this the compiler may choose another one for the outputs,
    # and the second step would be compiled again.
    placed = (jax.tree.map(lambda x: x.sharding, shapes), sharding.replicated(mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=placed)


def compile_step(step_fn: Callable[..., Any], *arguments: Any) -> None:
    """Compile for arguments of these shapes, so that a call finds it done.

    Apart from the call, because the compiler's memory can then go back before the step takes its
    own: ViT-S on CPU, peak 1.9 GB instead of 2.3.
    """
    step_fn.lower(*arguments).compile()
    startup.return_free_memory()


# ---- data ---------------------------------------------------------------------------------------


def phase_batches(
    config: ConfigDict, data: mixture.Mixture, index: int, mesh: Mesh
) -> pipeline.Batches:
    """Batches of a phase for this process; a pure function of (seed, phase, step)."""
    host = sharding.local_runs(mesh)
    return from_config.phase_batches(config, index, data, configs.patch_stride(config), host)


def open_batches(run: Run, span: phases.Span, first: int) -> pipeline.BatchStream:
    """Batches of a phase from its step `first` on."""
    how = run.config.data
    return phase_batches(run.config, run.data, span.index, run.mesh).stream(
        first, workers=how.workers, threads=how.threads or None, prefetch=how.prefetch
    )


def open_unreadable(workdir: pathlib.Path) -> UnreadableList:
    """`unreadable.txt`; further processes of a run, which read other images, add their number."""
    process = jax.process_index()
    return UnreadableList(workdir / f"unreadable{f'.{process}' * bool(process)}.txt")


def pair(values: Sequence[float]) -> tuple[float, float]:
    """Two numbers of a config as floats (flags make tuples of whole numbers too)."""
    low, high = values
    return float(low), float(high)


# ---- state --------------------------------------------------------------------------------------


def restore(
    run: Run, saves: checkpoint.Checkpoints, spans: tuple[phases.Span, ...]
) -> tuple[states.State | None, int]:
    """The newest good checkpoint of this run, or (None, 0)."""
    step = saves.latest()
    if step is None:
        return None, 0
    span = next(span for span in spans if span.first < step <= span.last)
    shapes = states.abstract(run.config, run.networks, span.phase, run.mesh)
    state, _ = saves.restore(step, shapes)
    return state, step


def begin_phase(
    run: Run, saves: checkpoint.Checkpoints, span: phases.Span, state: states.State | None
) -> states.State:
    """The state at the first step of a phase (`phase.start`, `phase.gram.source`)."""
    config, phase = run.config, span.phase
    if phase.start == "previous" and state is not None:
        zeros = states.zero_centers(config, phase, run.mesh)
        state = {**state, "gram": {}, "centers": zeros | state["centers"] if zeros else {}}
    else:
        fresh = states.create(config, run.networks, phase, run.mesh)
        if phase.start == "previous_teacher" and state is not None:
            loaded = state["teacher"]
        elif phase.start in OWN_STARTS:
            loaded = fresh["student"]
        else:
            loaded = load_weights(phase.start, fresh["student"])
        both = {name: states.copy(loaded, fresh[name]) for name in ("student", "teacher")}
        state = {**fresh, **both, "step": sharding.to_counter(span.first, run.mesh)}
    if phase.gram.teacher == "snapshot":
        like = state["teacher"]["backbone"]
        source = phase.gram.source
        if source == "start":
            gram = states.copy(like)
        elif source.startswith("step:"):
            teacher = saves.restore_item(int(source[5:]), "teacher", state["teacher"])
            gram = teacher["backbone"]
        else:
            gram = load_weights(source, {"backbone": like})["backbone"]
        state = {**state, "gram": gram}
    return state


def load_weights(source: str, like: states.Params) -> states.Params:
    """Weights of elsewhere, placed like `like`; where they do not fit, the run ends in words."""
    try:
        return weights.load_params(source, like=like)
    except ValueError as error:
        raise checkpoint.CheckpointError(str(error)) from error


def save(
    run: Run, saves: checkpoint.Checkpoints, span: phases.Span, state: states.State, step: int
) -> None:
    """Start an asynchronous checkpoint of everything, with what is needed to read it."""
    run.home.upload()
    saves.save(
        step,
        state,
        {
            "step": step,
            "phase": span.phase.name,
            "data": {"phase_index": span.index, "next_step": step - span.first},
            "config": configs.flatten(run.config),
        },
    )


def write_config(run: Run) -> None:
    """`config.json`: the run's config as a tree and flat, once."""
    target = run.workdir / "config.json"
    if jax.process_index() or target.exists():
        return
    tree = json.loads(configs.to_json(run.config))
    text = json.dumps({"config": tree, "flat": configs.flatten(run.config)}, indent=1) + "\n"
    temporary = target.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(target)


def write_weights(run: Run, state: states.State, step: int) -> None:
    """`weights/teacher.safetensors`: what `dinojax.load` and other runs start from."""
    config = json.loads(configs.to_json(run.config))
    target = run.workdir / "weights" / "teacher.safetensors"
    with writing(target):
        weights.save_weights(target, state["teacher"], config, step)


@contextlib.contextmanager
def writing(target: pathlib.Path) -> Iterator[None]:
    """Where a file cannot be written (a full disk), say which."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"{target} could not be written: {reason}") from error


# ---- looking at it ------------------------------------------------------------------------------


def feature_function(
    config: ConfigDict, networks: states.NetworkSet
) -> Callable[[states.Params, jax.Array], Any]:
    """(backbone parameters, uint8 images [n, i, j, c]) -> Features, without augmentation."""
    mean = 255.0 * np.asarray(config.data.mean, np.float32)
    std = 255.0 * np.asarray(config.data.std, np.float32)

    def features(params: states.Params, images: jax.Array) -> Any:
        pixels = (images.astype(jnp.float32) - mean[None, None, None]) / std[None, None, None]
        return networks.backbone.apply(params, (pixels,))[0]

    return features


def evaluate_floor(run: Run, state: states.State, log: writers.MetricsLog) -> None:
    """What the untrained network and raw pixels reach, once: the floor to clear."""
    if run.evaluator is None:
        return
    row = {f"untrained_{name}": value for name, value in knn_scores(run, state)}
    row |= {f"pixels_{name}": value for name, value in run.evaluator.pixel_knn()}
    log.write_eval(0, "floor", row)
    tell(0, row)


def evaluate(run: Run, state: states.State, log: writers.MetricsLog, step: int, phase: str) -> None:
    """k-NN of the teacher and PCA maps of fixed images."""
    if run.evaluator is not None:
        row = dict(knn_scores(run, state))
        log.write_eval(step, phase, row)
        tell(step, row)
    if run.config.eval.pictures:
        images = pictured(run)
        seen = jax.device_get(run.features(state["teacher"]["backbone"], images).patches)
        if jax.process_index():
            return
        side = run.config.eval.size // configs.patch_stride(run.config)
        sheet = visualize.pca_sheet(images, np.asarray(seen, np.float32), (side, side))
        target = run.workdir / "pictures" / f"pca_{step:08d}.png"
        with writing(target):
            visualize.save(sheet, target)
        log.picture(step, "pca", sheet)


def pictured(run: Run) -> UInt8[np.ndarray, "n i j c"]:
    """The images of the PCA sheet, of every component as many."""
    parts, size = run.data.components, run.config.eval.size
    found = []
    for index, part in enumerate(parts):
        count = len(range(index, run.config.eval.pictures, len(parts)))
        if count:
            found.append(visualize.fixed_images(part.source, min(count, len(part.source)), size))
    return np.concatenate(found)


def knn_scores(run: Run, state: states.State) -> Iterator[tuple[str, float]]:
    """k-NN of the teacher's CLS token."""
    backbone = state["teacher"]["backbone"]
    return run.evaluator.run(lambda images: run.features(backbone, images).cls)


def tell(step: int, row: dict[str, float]) -> None:
    """One line for people: the accuracies of an evaluation."""
    say(f"step {step:,}: " + "  ".join(f"{name} {value:.1f}%" for name, value in row.items()))


def say(text: str) -> None:
    """For people, and once: of several processes only the first speaks."""
    if jax.process_index() == 0:
        print(text, flush=True)


def work_per_image(
    config: ConfigDict, networks: states.NetworkSet, phase: ConfigDict
) -> profiling.Work:
    """FLOPs of one image, nominal and executed, averaged over the phase's crop sizes."""
    params = jax.eval_shape(lambda key: states.init_params(networks, key), jax.random.key(0))
    for name in ("dino", "ibot"):
        if not phase.losses[name]:
            params.pop(f"{name}_head")
    stride, works = configs.patch_stride(config), []
    for sizes in phase.crops.sizes:
        grid = (sizes[0] // stride,) * 2
        slots = masking.mask_slots(
            2 * phase.group, grid, phase.masks.probability, pair(phase.masks.ratio)
        )
        works.append(
            profiling.work_per_image(
                params,
                tuple(sizes),
                phase.crops.locals,
                masked=slots / phase.group,
                group=phase.group,
                drop_path=config.model.drop_path,
            )
        )
    chances = phase.crops.probabilities
    mean = [sum(p * w for p, w in zip(chances, column, strict=True)) for column in zip(*works)]
    return profiling.Work(*mean)


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0 = never) is due."""
    return every > 0 and step % every == 0


class StopRequest:
    """SIGTERM or Ctrl-C; the loop asks between two steps.

    Of several processes, any may be asked to stop: jax's preemption service hears of it and names a
    step that none has passed, so that all stop after the same one.
    """

    def __init__(self) -> None:
        self._set, self._several = False, jax.process_count() > 1
        # Not the step: a request before a resumed run's first one would name one long gone.
        self._asked = itertools.count(1)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._forward if self._several else self._hear)
            if not self._several:  # else the service has its own
                signal.signal(signal.SIGTERM, self._hear)

    def requested(self) -> bool:
        """Whether to stop now; to be asked once before every step."""
        if self._several and multihost_utils.reached_preemption_sync_point(next(self._asked)):
            print("\nSIGTERM: saving, then stopping ...", flush=True)
            self._set = True
        return self._set

    def _forward(self, number: int, frame: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def _hear(self, number: int, frame: Any) -> None:
        if self._set:
            raise KeyboardInterrupt
        self._set = True
        print(f"\n{signal.Signals(number).name}: saving, then stopping ...", flush=True)
