"""The life of a run: assemble, resume, step, save, show."""

import gc
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from lumina.checkpoint.load import Checkpoint, model_config, newest_whole_checkpoint
from lumina.checkpoint.lora import is_adapter
from lumina.checkpoint.manifest import EMA as EMA_WEIGHTS
from lumina.checkpoint.manifest import WEIGHTS, checkpoints_of, replace_text, set_aside, step_folder
from lumina.checkpoint.save import Piece, Saver, SaveState
from lumina.config.load import dump_config
from lumina.config.schema import Config
from lumina.data.loader import Loader
from lumina.data.plan import DataState
from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from lumina.model.flops import Flops, forward_flops
from lumina.parallel.activity import Phase
from lumina.parallel.engine import Engine, StepOutcome
from lumina.parallel.layout import check_layout, describe
from lumina.parallel.mesh import Mesh, World, close_mesh, first_then_others, open_mesh
from lumina.parallel.peak_memory import peak_memory as peak_memory_of
from lumina.parallel.randomness import Randomness
from lumina.parallel.watchdog import watch
from lumina.train.assemble import assemble, run_folder
from lumina.train.ema import EMA
from lumina.train.feed import Feed
from lumina.train.health import Health
from lumina.train.initial import Start, unfilled_model
from lumina.train.lora import Lora
from lumina.train.metrics import Metrics, StepMetrics, peak_tflops
from lumina.train.prepare import Preparer, TrainingPack
from lumina.train.preview import check_preview, draw_preview
from lumina.train.resume import check_same_run, lanes_of
from lumina.train.schedule import learning_rate
from lumina.train.step import StepResult, train_step
from lumina.train.stop import StopFile, StopSignals

_LEFT_OUT = StepResult(math.nan, StepOutcome(math.nan, skipped=True))


def train(config: Config, signals: StopSignals | None = None) -> None:
    """Run `config` to its last step, from its newest checkpoint if it has one.

    Args:
        signals: entered already; by default SIGTERM and Ctrl-C are heeded from here on.

    Raises:
        ValueError: for whatever in the configuration, the data or the run's folder does not fit; nothing is then
            written.
        RuntimeError: where too many steps in a row are not finite, or bits have flipped.
    """
    with ExitStack() as stack:
        signals = signals or stack.enter_context(StopSignals())
        model = model_config(config)
        check_layout(config, model, World.from_environment().size)
        mesh = open_mesh(config.parallel)
        stack.callback(close_mesh, mesh)
        stack.enter_context(watch(config, mesh))
        rollbacks = 0
        while not _run_from_newest(config, model, mesh, signals, again=rollbacks > 0):
            rollbacks += 1
            gc.collect()  # what hooks and modules hold of the engine that is gone


def _run_from_newest(config: Config, model: FlagDiTConfig, mesh: Mesh, signals: StopSignals, *, again: bool) -> bool:
    """As `Trainer.run`."""
    trainer, done = Trainer(config, model, mesh, signals), True
    try:
        done = trainer.run(again)
    finally:
        trainer.saver.close()
        trainer.engine.close(keep_groups=not done)
    return done


class Trainer:
    """One run on this process. Every rank makes one and does the same, but for its own packs, tokens and weights."""

    def __init__(self, config: Config, model: FlagDiTConfig, mesh: Mesh, signals: StopSignals):
        self.config, self.mesh, self.signals = config, mesh, signals
        self.run_dir = Path(config.run.dir)
        checkpoint, self._damaged = newest_whole_checkpoint(self.run_dir, mesh)
        self._notes = [f"a checkpoint is passed over: {problem}" for problem in self._damaged.values()]
        if checkpoint is not None:
            check_same_run(config, checkpoint)
        self.step = checkpoint.manifest.step if checkpoint else 0
        # What was converted from another trainer's folder starts its data from the beginning.
        state = DataState.from_dict(checkpoint.manifest.data) if checkpoint and checkpoint.manifest.data else None
        self.parts = assemble(config, model, mesh, lanes_of(config, state))
        check_preview(config, self.parts)
        # Ranks that work on the same packs meet the same bad samples: one of them writes them down.
        ledger = self.run_dir / "bad_samples" / f"rank_{mesh.data.rank:05d}.jsonl"
        self.loader = Loader(
            self.parts.index,
            self.parts.plan,
            self.parts.sizing,
            rank=mesh.data.rank,
            world=mesh.data.size,
            channels=self.parts.vae.pixel_channels,
            workers=config.data.workers,
            bad_samples=config.data.bad_samples,
            state=state,
            step=self.step,
            ledger_path=ledger if mesh.leads_replica else None,
            seed=config.run.seed,
        )
        preparer = Preparer(
            self.parts.model,
            self.parts.vae,
            self.parts.text,
            self.parts.objective,
            Randomness(config.run.seed),
            config.data.caption_dropout,
            mesh,
            config.data.pad_channels,
        )
        self.feed = Feed(self.loader, preparer, mesh, config.train.packs_per_forward)
        initial, start = self._initial_model(checkpoint)
        self._start = start
        self.shapes = {name: tuple(parameter.shape) for name, parameter in initial.named_parameters()}
        elsewhere = self.lora.kept_elsewhere if self.lora else ()
        self.engine = Engine(initial, config, mesh, self.parts.accumulation_steps, elsewhere)
        self.ema = EMA(self.engine.fragments, config.train.ema_decay)
        self.saver = Saver(self.run_dir, config, mesh)
        if start is not None:
            self.ema.restore(start.average)
        if checkpoint is not None:
            self.engine.restore(
                lambda kind, f: checkpoint.read(kind, f.name, f.start, f.numel, f.part),
                checkpoint.manifest.optimizer_steps,
            )
            self.ema.restore(lambda f: checkpoint.read(EMA_WEIGHTS, f.name, f.start, f.numel, f.part))

    def _initial_model(self, checkpoint: Checkpoint | None) -> tuple[FlagDiT, Start | None]:
        self.lora: Lora | None = None
        if checkpoint is not None and self.config.lora:
            model, self.lora = Lora.resumed(self.config, self.parts.model, checkpoint)
            self._notes += self.lora.said
            return model, None
        if checkpoint is not None:
            return unfilled_model(self.parts.model, checkpoint), None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.run.seed)
            model = FlagDiT(self.parts.model)
        if self.config.train.init_from is None:
            return model, None
        start = Start(self.config.train, model)
        self._notes += start.said
        if self.config.lora:
            self.lora = Lora(self.config, model, start.drawn)
            self._notes += self.lora.said
        return model, start

    def run(self, again: bool) -> bool:
        """From the present step to the last, or to where it is asked to stop.

        Args:
            again: after another trainer of this process, which went back: whoever asked that one to stop asks this.

        Returns:
            False where the run has to go back to its newest checkpoint, by another trainer.
        """
        with ExitStack() as stack:
            first_then_others(self.mesh, lambda first: self._claim(stack) if first else None)
            if self.mesh.is_first and self.step < self.config.train.steps:
                # One that stayed would be the newest for `checkpoint.keep`, a rollback and whoever opens the run.
                aside = [set_aside(folder) for folder in self._damaged]
                self._notes += [f"it is set aside as {folder}; remove it when you need it no more" for folder in aside]
                replace_text(self.run_dir / "config.yaml", dump_config(self.config))
            if self.lora and self._start:
                first_then_others(
                    self.mesh, lambda first: self.lora.write_base(self._start, self.mesh.activity) if first else None
                )
            metrics = stack.enter_context(Metrics(self.config, self.step + 1, enabled=self.mesh.is_first))
            self._introduce(metrics)
            if self.mesh.is_first and not again and self.stop_file.asked():
                metrics.say(self.stop_file.remove() or f"{self.stop_file.path} was there before the start: removed")
            return self._train(metrics)

    def _claim(self, stack: ExitStack) -> None:
        """Keep other processes out of the run's folder; one that was still in it may have saved since we looked."""
        stack.enter_context(run_folder(self.run_dir))
        newer = [
            folder for folder in checkpoints_of(self.run_dir) if folder.name > step_folder(self.run_dir, self.step).name
        ]
        if unknown := [folder for folder in newer if folder not in self._damaged]:
            raise ValueError(
                f"another process saved {unknown[-1]} while this one started; start again to go on from it"
            )

    def _introduce(self, metrics: Metrics) -> None:
        plan, parts = self.parts.plan, self.parts
        parameters = sum(torch.Size(shape).numel() for name, shape in self.shapes.items() if not is_adapter(name))
        metrics.say(
            f"Flag-DiT with {parameters:,} parameters · {len(parts.index):,} samples · "
            f"packs a step: {self.config.train.global_batch_packs}, of {plan.tokens_per_pack:,} tokens "
            f"({plan.waste(self.loader.state, 20, self.step + 1):.1%} unused) · ranks: {describe(self.mesh)}, "
            f"ZeRO {self.config.parallel.zero_stage}, {self.config.precision} · "
            f"attention: {self.engine.attention_backend}"
        )
        for note in self._notes:
            metrics.say(note)
        if self.step >= self.config.train.steps:
            metrics.say(f"{self.run_dir} is at step {self.step} of {self.config.train.steps}: nothing to do")
        elif self.step:
            metrics.say(f"resuming {self.run_dir} after step {self.step}")

    def _train(self, metrics: Metrics) -> bool:
        """As `run`."""
        config, activity, skipped_in_a_row = self.config, self.mesh.activity, 0
        health = Health(config, self.mesh, self.engine, self.ema, self.step)

        def before_update() -> None:
            self.saver.before_update()
            health.before_update()

        steps = iter(self.feed)
        while self.step < config.train.steps:
            self.step += 1
            started = time.perf_counter()
            activity.enter(Phase.DATA, step=self.step)
            left_out = health.leaves_out(self.step)
            if left_out:
                steps.close()
                data, steps = self.feed.pass_over(), iter(self.feed)
            else:
                data = next(steps)
            packs = data.packs
            data_seconds = time.perf_counter() - started
            rate = learning_rate(config.train, self.step)
            result = _LEFT_OUT
            if not left_out:
                result = train_step(
                    self.engine,
                    self.ema,
                    self.parts.objective,
                    packs,
                    global_samples=data.global_samples,
                    learning_rate=rate,
                    step=self.step,
                    before_update=before_update,
                )
                health.after_update()
            activity.enter(Phase.TOTALS)
            skipped = result.outcome.skipped
            tokens = sum(sum(pack.layout.lengths) for pack in packs)
            counts = [self._flops(pack) for pack in packs]
            flops = sum(c.of_step(frozen=self.lora is not None) for c in counts)
            again = sum(c.again(config.parallel.recompute) for c in counts)
            # What is said of whole packs is said once for all ranks that work on them.
            of_packs = [tokens, flops, again, data.bad] if self.mesh.leads_replica else [0, 0, 0, 0]
            # The norm is everybody's, but who decides by it must have it to the last bit.
            of_first = [result.outcome.grad_norm, self.stop_file.asked()] if self.mesh.is_first else [0, 0]
            of_rank = [result.loss_share, self.signals.asked, health.found, self.saver.ready]
            loss, signalled, found, ready, norm, asked, tokens, flops, again, bad = self.mesh.sum(
                [*of_rank, *of_first, *of_packs]
            )
            stop, last = signalled or asked, self.step == config.train.steps
            saves = stop or last or (not left_out and self.step % config.checkpoint.every == 0)
            spike = not skipped and health.is_spike(loss, norm)
            health.examine(self.step, found, compare=saves or skipped or spike)
            peak_memory = self.mesh.largest(peak_memory_of(self.mesh.device) or 0)
            seconds = time.perf_counter() - started
            tflops, again = (count / seconds / self.mesh.world.size / 1e12 for count in (flops, again))
            peak, slowest = peak_tflops(config, self.mesh.device), activity.straggler
            metrics.write(
                StepMetrics(
                    step=self.step,
                    loss=loss if math.isfinite(loss) else None,
                    grad_norm=norm if math.isfinite(norm) else None,
                    lr=rate,
                    samples=data.global_samples,
                    tokens=int(tokens),
                    seconds=seconds,
                    tokens_per_second=tokens / seconds,
                    samples_per_second=data.global_samples / seconds,
                    tflops_per_device=tflops,
                    hardware_tflops_per_device=tflops + again,
                    mfu=tflops / peak if peak else None,
                    peak_memory_bytes=int(peak_memory) or None,
                    skipped=skipped,
                    epoch=data.epoch,
                    data_seconds=data_seconds,
                    save_seconds=self.saver.take_seconds(),
                    bad_samples=int(bad),
                    spike=spike,
                    left_out=left_out,
                    slowest_rank=slowest.rank if slowest else None,
                    slowest_ratio=slowest.ratio if slowest else None,
                )
            )
            if not left_out:
                skipped_in_a_row = skipped_in_a_row + 1 if skipped else 0
            if skipped_in_a_row >= config.train.skipped_steps_limit:
                raise RuntimeError(
                    f"{skipped_in_a_row} steps in a row (to step {self.step}) had a loss or gradients that are not "
                    "finite and were skipped; lower train.learning_rate or look at the data, then resume"
                )
            activity.enter(Phase.SAVE)
            metrics.say(self.saver.advance(ready == self.mesh.world.size))
            if spike:
                metrics.say(self.saver.wait())  # it may be what is gone back to
                if health.must_go_back(self.step, metrics.say):
                    if stop:
                        self._stopped(metrics, "nothing to save")
                    return bool(stop)
            if saves:
                self._save(data.state_after, metrics, wait=bool(stop) or last)
            if config.preview.every and (last or self.step % config.preview.every == 0):
                activity.enter(Phase.PREVIEW)
                self._preview(metrics)
            if last and skipped_in_a_row:
                metrics.say(f"the last {skipped_in_a_row} steps were not finite and were skipped: look at the loss")
            if stop:
                self._stopped(metrics, f"saved after step {self.step}")
                break
        activity.enter(Phase.CLOSING)
        return True

    def _stopped(self, metrics: Metrics, what: str) -> None:
        metrics.say(f"asked to stop: {what}; the same command goes on from there")
        if self.mesh.is_first and (problem := self.stop_file.remove()):
            metrics.say(problem)

    @property
    def stop_file(self) -> StopFile:
        return StopFile(self.run_dir)

    def _flops(self, pack: TrainingPack) -> Flops:
        captions = pack.captions.lengths if pack.captions is not None else ()
        return forward_flops(self.parts.model, pack.layout.lengths, captions)

    def _save(self, data: DataState | None, metrics: Metrics, wait: bool) -> None:
        """`data` is known to the leaders of replicas, of which the first rank is one."""
        state = SaveState(
            self.step,
            self.engine.optimizer_steps,
            data={} if data is None else data.to_dict(),
            model=self.parts.model.to_dict(),
            texts=self.lora.texts if self.lora else {},
        )
        metrics.say(self.saver.start(state, self._pieces()))
        if wait:
            metrics.say(self.saver.finish())

    def _pieces(self) -> Iterator[Piece]:
        """What this rank writes; of what several ranks hold, one writes it."""
        if self.mesh.is_first:
            for name, values in self.engine.frozen.items():
                for kind in (WEIGHTS, EMA_WEIGHTS):
                    yield Piece(kind, name, tuple(values.shape), 0, values.reshape(-1))
        for fragment, average, owned in zip(self.engine.fragments, self.ema.values, self.engine.owned, strict=True):
            if not owned:
                continue
            contents = {WEIGHTS: fragment.master, EMA_WEIGHTS: average, **self.engine.moments(fragment)}
            for kind, values in contents.items():
                yield Piece(kind, fragment.name, fragment.shape, fragment.start, values, fragment.part)

    def _preview(self, metrics: Metrics) -> None:
        weights = self._averaged_weights()
        if weights is not None:
            path = draw_preview(self.config, self.parts, weights, self.step, self.mesh.device)
            metrics.picture(path, self.step)

    def _averaged_weights(self) -> dict[str, Tensor] | None:
        """The EMA weights, whole, on the first rank."""
        mine = zip(self.engine.fragments, self.ema.values, self.engine.owned, strict=True)
        by_name = {fragment.name: (fragment, values) for fragment, values, owned in mine if owned}
        weights = {}
        for name, shape in (self.lora.held if self.lora else self.shapes).items():
            if name in self.engine.frozen:
                weights[name] = self.engine.frozen[name]
                continue
            whole = torch.zeros(shape, device=self.mesh.device)
            if name in by_name:
                fragment, values = by_name[name]
                fragment.place_in(whole, values)
            self.mesh.sum_to_first(whole)
            weights[name] = whole
        if not self.mesh.is_first:
            return None
        return self.lora.whole(weights) if self.lora else weights
