"""The reference job: a real PPO run from stable-baselines3, watched through the public integration."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from esper_telemetry.exporters.http import Exporter, start_exporter
from esper_telemetry.exporters.otlp import OtlpExporter, start_otlp
from esper_telemetry.exporters.textfile import TextfileExporter, start_textfile
from esper_telemetry.integrations.sb3 import EsperCallback
from esper_telemetry.monitor import GradientMonitor, GradientsCritical, watch
from esper_telemetry.reference.faults import Fault, FaultInjector
from esper_telemetry.reference.terminal import Display
from esper_telemetry.snapshot import Snapshot

try:
    import gymnasium
    from gymnasium import spaces
    from stable_baselines3 import PPO
    from stable_baselines3.common.logger import Logger
except ImportError as error:
    raise ImportError("stable-baselines3 is not installed: pip install 'esper-telemetry[ppo]'") from error

# Short rollouts: ten episodes of CartPole-v1 are about 200 steps, and are to give more than 100 checks.
ROLLOUT_STEPS = 32
BATCH_SIZE = 8
EPOCHS = 10
HEADS = {"policy": "action_net", "value": "value_net"}
_CHECKS_PER_UPDATE = EPOCHS * math.ceil(ROLLOUT_STEPS / BATCH_SIZE)


@dataclass(frozen=True, slots=True)
class Options:
    """Hold what `esper ppo` was asked to do; see its `--help`."""

    episodes: int = 10
    env: str = "CartPole-v1"
    seed: int = 0
    listen_address: str | None = None
    inject: Sequence[Fault] = ()
    on_critical: str = "continue"
    rewind_every: int = 100
    max_rewinds: int = 3
    linger: float | None = None
    textfile_dir: str | None = None
    record_dir: str | None = None
    otlp_endpoint: str | None = None
    web_config_file: str | None = None
    allow_drill: bool = False


@dataclass(frozen=True, slots=True)
class Summary:
    """Hold what a run comes to; halted and died say why it did not run to its end."""

    checks: int = 0
    bad_checks: int = 0
    worst_inf: int = 0
    worst_nan: int = 0
    first_bad_check: int | None = None
    first_bad_layer: str | None = None
    seconds: float = 0.0
    monitor_seconds: float = 0.0
    halted: str | None = None
    died: str | None = None
    missed: Sequence[Fault] = ()

    def after(self, snapshot: Snapshot) -> Summary:
        """Return the summary after one more check."""
        bad = snapshot.inf_grad_count > 0 or snapshot.nan_grad_count > 0
        first = bad and self.first_bad_check is None
        return replace(
            self,
            checks=snapshot.checks,
            bad_checks=self.bad_checks + bad,
            worst_inf=max(self.worst_inf, snapshot.inf_grad_count),
            worst_nan=max(self.worst_nan, snapshot.nan_grad_count),
            first_bad_check=snapshot.checks if first else self.first_bad_check,
            first_bad_layer=snapshot.origin_layer if first else self.first_bad_layer,
        )


class PPOJob:
    """Train PPO with its gradients watched and served.

    Making the job builds everything that can be wrong and starts to serve, but does not train yet. Raise a ValueError
    that begins with the option at fault.
    """

    def __init__(self, options: Options) -> None:
        if options.episodes < 1:
            raise ValueError(f"--episodes: expected at least 1, got {options.episodes}")
        if options.linger is not None and not 0 <= options.linger < math.inf:
            raise ValueError(f"--linger: expected seconds of at least 0, got {options.linger}")
        self._options = options
        self._model = _model(options)
        self._injector = self._fault_injector()
        self._summary = Summary()
        self.monitor = self._watch()
        self.monitor.on_check(self._see)
        self._textfile: TextfileExporter | None = None
        self._otlp: OtlpExporter | None = None
        self.exporter = self._serve()
        if options.textfile_dir is not None:
            self._textfile = self._write_textfile(options.textfile_dir)
        if options.otlp_endpoint is not None:
            self._otlp = self._push(options.otlp_endpoint)

    def train(self, display: Display) -> Summary:
        """Train until the episodes are over or a check halts the run; return what it came to."""
        callback = _EpisodeLimit(self.monitor, self._options.episodes, display)
        started = time.perf_counter()
        try:
            self._model.learn(_most_steps(self._options, self._model), callback=callback)
        except GradientsCritical as critical:
            self._summary = replace(self._summary, halted=str(critical))
            callback.on_training_end()
            self.monitor.close()
        except Exception as error:
            if self._summary.bad_checks == 0:
                raise
            # A bad gradient makes NaN weights, and torch refuses the distribution that they predict. The run did not
            # end as planned, so the monitor is not closed, and whoever watches the target may find it dead.
            self._summary = replace(self._summary, died=f"{type(error).__name__}: {error}".partition("\n")[0])
            callback.on_training_end()
        else:
            self.monitor.close()
        return replace(
            self._summary,
            seconds=time.perf_counter() - started,
            monitor_seconds=self.monitor.snapshot.monitor_seconds,
            missed=tuple(self._injector.missed),
        )

    def close(self) -> None:
        """Wait for a last scrape where one is needed, and stop to serve, to write and to push."""
        if self._textfile is not None:
            self._textfile.close()
        if self._otlp is not None:
            self._otlp.close()
        self.exporter.close()

    def _see(self, snapshot: Snapshot) -> None:
        self._summary = self._summary.after(snapshot)

    def _fault_injector(self) -> FaultInjector:
        reach = math.ceil(_most_steps(self._options, self._model) / ROLLOUT_STEPS) * _CHECKS_PER_UPDATE
        for fault in self._options.inject:
            if fault.check > reach:
                raise ValueError(
                    f"--inject: expected a check from 1 to {reach}, the last one in reach, got {fault.check}"
                )
        try:
            return FaultInjector(self._model.policy, self._options.inject)
        except ValueError as error:
            raise ValueError(f"--inject: {error}") from None

    def _watch(self) -> GradientMonitor:
        policy = self._model.policy
        try:
            return watch(
                policy,
                optimizer=policy.optimizer,
                heads=HEADS,
                on_critical=self._options.on_critical,
                rewind_every=self._options.rewind_every,
                max_rewinds=self._options.max_rewinds,
                before_check=self._injector if self._options.inject else None,
                record_dir=self._options.record_dir,
            )
        except OSError as error:
            raise ValueError(f"--{str(error.strerror).replace('record_dir', 'record-dir', 1)}") from None
        except ValueError as error:
            raise ValueError(re.sub("^(rewind_every|max_rewinds):", _option, str(error))) from None

    def _serve(self) -> Exporter:
        try:
            return start_exporter(
                self.monitor,
                self._options.listen_address,
                linger=self._options.linger,
                allow_drill=self._options.allow_drill,
                web_config_file=self._options.web_config_file,
                strict=True,
            )
        except (ValueError, OSError) as error:
            reason = f"address: {error.strerror}" if isinstance(error, OSError) else str(error)
            option = re.sub("^web_config_file:", "--web.config.file:", re.sub("^address:", "--listen-address:", reason))
            raise ValueError(option) from None

    def _write_textfile(self, directory: str) -> TextfileExporter:
        try:
            return start_textfile(self.monitor, directory)
        except OSError as error:
            self.close()
            raise ValueError(f"--{error.strerror}") from None  # it begins with "textfile-dir:"

    def _push(self, endpoint: str) -> OtlpExporter:
        try:
            return start_otlp(self.monitor, endpoint)
        except (ValueError, ImportError) as error:
            self.close()
            raise ValueError(re.sub("^endpoint:", "--otlp-endpoint:", str(error))) from None


def _option(name: re.Match[str]) -> str:
    return f"--{name[0].replace('_', '-')}"


class _EpisodeLimit(EsperCallback):
    """End the run after the update in which the last episode ended, so that the last steps are trained on too."""

    def __init__(self, monitor: GradientMonitor, episodes: int, display: Display) -> None:
        super().__init__(monitor)
        self._limit = episodes
        self._display = display
        self._enough = False

    def _on_rollout_start(self) -> None:
        super()._on_rollout_start()
        self._enough = self.episodes >= self._limit
        self._show()

    def _on_step(self) -> bool:
        before = self.episodes
        go_on = super()._on_step() and not self._enough
        if self.episodes != before:
            self._show()
        return go_on

    def _show(self) -> None:
        self._display.progress(min(self.episodes, self._limit), self._monitor.snapshot)


def _model(options: Options) -> PPO:
    try:
        env = gymnasium.make(options.env)
    except Exception as error:  # every environment has errors of its own
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"--env: expected a Gymnasium environment such as CartPole-v1, got {options.env!r}: {reason}"
        ) from None
    try:
        model = PPO(
            _policy(env.observation_space),
            env,
            n_steps=ROLLOUT_STEPS,
            batch_size=BATCH_SIZE,
            n_epochs=EPOCHS,
            seed=options.seed,
            device="cpu" if _policy(env.observation_space) == "MlpPolicy" else "auto",
        )
    except (AssertionError, ValueError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--env: expected spaces that PPO supports, got {options.env!r}: {reason}") from None
    model.set_logger(Logger(folder=None, output_formats=[]))  # the default one leaves a folder behind in /tmp
    return model


def _policy(observations: spaces.Space[object]) -> str:
    if isinstance(observations, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if len(observations.shape or ()) == 3 else "MlpPolicy"


def _most_steps(options: Options, model: PPO) -> int:
    """Return an upper bound of the steps that the episodes can take."""
    assert model.env is not None
    spec = model.env.get_attr("spec")[0]
    longest = spec.max_episode_steps if spec and spec.max_episode_steps else 1_000_000
    return options.episodes * longest
